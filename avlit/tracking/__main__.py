"""`python -m avlit.tracking RUN_FOLDER`: the sender that a tracker starts beside training."""

import sys

from avlit.tracking.sender import send_until_over

if __name__ == "__main__":
    sys.exit(send_until_over(sys.argv[1]))
