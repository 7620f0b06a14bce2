"""`just config`: every key of a resolved config with what it means, as yaml."""

from collections.abc import Sequence

from avlit.config import Config, load_config, to_yaml
from avlit.settings import leaves


def main(words: Sequence[str]) -> int:
    """Print the config that the words describe."""
    print(annotated(load_config(words)))
    return 0


def annotated(config: Config) -> str:
    """The config's yaml with the meaning of each key as a comment beside it."""
    keys = leaves(type(config))
    section, lines = "", []
    for line in to_yaml(config).splitlines():
        name = line.split(":", 1)[0]
        if not line.startswith(" ") and ":" in line:
            section = name
        key = f"{section}.{name.strip()}" if line.startswith("  ") else name
        about = keys[key].about if key in keys else ""
        lines.append((line, about))
    column = min(44, max(len(line) for line, about in lines if about))
    return "\n".join(f"{line:<{column}}  # {about}" if about else line for line, about in lines)
