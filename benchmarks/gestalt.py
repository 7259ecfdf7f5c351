"""DiSRT on the fetched ViT-S: the odd one of three found, by layer, with and without its positions.

    python benchmarks/gestalt.py --rows 12 --seeds 1 > benchmarks/results/disrt-gestalt.json

Pictures: outlines, and crops of the two photographs that scikit-learn carries (for another backdrop than
lines); broken by shuffled patches of 14 pixels.
"""

from __future__ import annotations

import argparse
import copy
import json

import torch
from torch import Tensor

import attlas
from attlas.tasks.train.disrt_gestalt import odd_one_out, outlines

SIZE, PATCH = 112, 14


def crops(rng: torch.Generator, rows: int) -> Tensor:
    """Crops of 224 pixels of the photographs, halved."""
    from sklearn.datasets import load_sample_images

    photographs = [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    found = []
    for row in range(rows):
        picture = photographs[row % len(photographs)]
        top, left = (
            int(torch.randint(side - 2 * SIZE, (), generator=rng)) for side in picture.shape[1:]
        )
        found.append(picture[:, top : top + 2 * SIZE, left : left + 2 * SIZE])
    return torch.nn.functional.avg_pool2d(torch.stack(found), 2)


@torch.no_grad()
def by_layer(model: torch.nn.Module, given: Tensor) -> list[float]:
    """The score by the mean of the patches' states before and behind each block."""
    states = [
        torch.stack(model((some - 0.45) / 0.225, output_hidden_states=True).hidden_states)[:, :, 1:]
        for some in given.flatten(0, 1).split(30)
    ]
    features = torch.cat([each.mean(2) for each in states], dim=1)
    return [odd_one_out(layer.unflatten(0, (-1, 3))) for layer in features]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    model = attlas.load("vit")
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.embeddings.position_embeddings[:, 1:] = 0
    task, found = attlas.make("disrt-gestalt", size=SIZE, patch=PATCH), []
    for seed in range(given.seeds):
        for name, make in (("outlines", lambda rng, n: outlines(rng, n, SIZE)), ("photographs", crops)):
            rng = torch.Generator().manual_seed(seed)
            triplets = task.triplets(rng, make(rng, given.rows))
            for told, net in (("intact", model), ("no positions", without)):
                scores = [round(score, 3) for score in by_layer(net, triplets)]
                found.append({"seed": seed, "pictures": name, "model": told, "by layer": scores})
    print(json.dumps({"rows": given.rows, "chance": 1 / 3, "results": found}, indent=1))


if __name__ == "__main__":
    main()
