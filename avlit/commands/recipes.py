"""`just recipes`: what can be trained, one line each."""

from collections.abc import Sequence

from avlit.discovery import recipe_keys, recipe_yaml
from avlit.errors import ConfigError


def main(words: Sequence[str]) -> int:
    """Print every recipe key with the `about:` of its yaml."""
    if words:
        raise ConfigError(f"{words[0]!r}: this command takes no words; for one recipe's keys: just config recipe=…")
    lines = {key: str(recipe_yaml(key)[0].get("about", "")) for key in recipe_keys()}
    width = max(map(len, lines), default=0)
    for key, about in lines.items():
        print(f"{key:<{width}}  {about}")
    return 0
