"""What `kill_fuzz` has its server import, once for all the processes that it starts."""

import recipes.mtv.recipe
import recipes.unitalking.recipe  # noqa: F401
