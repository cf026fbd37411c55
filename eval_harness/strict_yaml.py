"""YAML as people mean it: a key that stands in a mapping twice is an error, where YAML keeps the last one silently."""

from typing import Any

import yaml


def load(text: str) -> Any:
    """The document in a text. Raises yaml.YAMLError, for a repeated key too."""
    return _OneOfEachKey(text).get_single_data()


class _OneOfEachKey(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        given = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and given.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)
