"""How often screening flags a chest X-ray, and how often it lets something else pass. Called by screening.sh.

    python runs/screening.py STORE OUT.json

Fits the screening of `hilum fit` on the training split of a store, exactly as `fit` does, and judges its test split:
the images as they are (false flags), inverted, turned, cropped and tiled copies of each, and KIND_IMAGES drawings of
each kind of tests/programs/strangers.py. Fixed before it was run: the seed, the split, all numbers of
deploy/screening.py. What pictures are described by was chosen on another split of the same X-rays and on these kinds.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "programs"))

import strangers

from hilum.commands.fit_outputs import screen_inputs
from hilum.core.intervals import wilson_interval
from hilum.data.store import Store
from hilum.deploy.gradients import gradient_map
from hilum.deploy.screening import read_screening

KIND_IMAGES = 30
SEED = 0


def main() -> None:
    """Fit, judge, print and write."""
    store, out = Store.open(Path(sys.argv[1])), Path(sys.argv[2])
    out.parent.mkdir(parents=True, exist_ok=True)
    examples = SimpleNamespace(store=store, train=store.indices("train"), val=store.indices("val"))
    content = screen_inputs(out.parent, examples, SimpleNamespace(seed=SEED, workers=1))
    screening = read_screening(out.parent, content)
    assert screening is not None
    rng = np.random.default_rng(SEED)
    films = [store.read(int(index)) for index in store.indices("test")]
    pictures = {"upright": films, "inverted": [strangers.inverted(rng, film) for film in films]}
    pictures |= {name: [change(rng, film) for film in films] for name, change in strangers.CHANGED.items()}
    pictures |= {name: [draw(rng, films[0]) for _ in range(KIND_IMAGES)] for name, draw in strangers.DRAWN.items()}
    rows = {}
    for name, ones in pictures.items():
        judged = screening.judge(np.stack([gradient_map(one) for one in ones]))
        codes = Counter(one.flag.code for one in judged if one.flag)
        flagged = sum(codes.values())
        rows[name] = {
            "images": len(ones),
            "flagged": flagged,
            "codes": dict(codes),
            "ci95": wilson_interval(flagged, len(ones)),
        }
        low, high = rows[name]["ci95"]
        share = f"{flagged / len(ones):6.1%} [{low:.1%}, {high:.1%}]"
        print(f"{name:16} {flagged:4} of {len(ones):4} flagged, {share}  {dict(codes)}")
    views = [str(view) for view in store.views[store.indices("test")]]
    described = None
    if screening.views is not None:
        described = screening.views.describe(np.stack([gradient_map(film) for film in films]), views)
        print(f"views: {described}")
    record = {"screening": content["screening"], "test": rows, "views": described}
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"fitted on {screening.record.images} images, threshold {screening.threshold:.3f} at quantile "
          f"{screening.record.quantile} of patients left out; validation: {screening.record.false_flags}")  # fmt: skip


if __name__ == "__main__":
    main()
