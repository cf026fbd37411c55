"""Every measure by name. A measure is a named, versioned quantity over the items of a set; its file says how."""

from eval_harness.measures import answers, choices, generated, memorisation, texts
from eval_harness.measures.base import Measure

VERSION = 2  # raise it with any definition: what was measured by the old one is measured again

MEASURES: dict[str, Measure] = {
    **answers.MEASURES,
    **choices.MEASURES,
    **texts.MEASURES,
    **generated.MEASURES,
    **memorisation.MEASURES,
}

__all__ = ["MEASURES", "VERSION", "Measure"]
