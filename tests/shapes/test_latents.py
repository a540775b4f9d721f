"""Shards of latents match their prompts, both new and from disk. Also image grids."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from samples.shapes import latents, train_classes
from samples.shapes.captions import training_pairs
from samples.shapes.image_grid import save_grid
from samples.shapes.render import render
from tpx_export.model.autoencoder import Autoencoder, AutoencoderSpec
from tpx_runtime.errors import BadInput

COUNT = 5


@pytest.fixture
def autoencoder(monkeypatch: pytest.MonkeyPatch) -> Autoencoder:
    """A small random autoencoder; shards have 5 scenes, rendered in batches of 2 without compilation."""
    monkeypatch.setattr(latents, "SHARD_SIZE", COUNT)
    monkeypatch.setattr(latents, "RENDER_BATCH", 2)
    monkeypatch.setattr(latents, "SIDE_PX", 32)
    monkeypatch.setattr(latents, "render", lambda scenes, side, device, fast: render(scenes, side, device))
    torch.manual_seed(0)
    return Autoencoder(AutoencoderSpec(4, (16, 16, 8))).eval()


def test_latents_encode_the_scenes_of_their_prompts(tmp_path: Path, autoencoder: Autoencoder) -> None:
    prompts, z = latents.load_shard(tmp_path, 3, 7, autoencoder)
    assert (z.shape, z.dtype) == ((COUNT, 4, 4, 4), torch.float16)
    pairs = list(itertools.islice(training_pairs(7 * 1_000_003 + 3), COUNT))
    assert prompts == [prompt for prompt, _ in pairs]
    with torch.no_grad():
        expected = autoencoder.encode(render([scene for _, scene in pairs], 32) * 2 - 1)
    # Between each latent and that of each scene.
    difference = (z.float()[:, None] - expected).abs().amax((2, 3, 4))
    assert difference.argmin(1).tolist() == list(range(COUNT))
    assert difference.diagonal().max() < 0.05 * expected.abs().max()


def test_a_shard_is_rendered_once_per_index_and_autoencoder(
    tmp_path: Path, autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = latents.load_shard(tmp_path, 0, 0, autoencoder)
    monkeypatch.delattr(latents, "render")
    again = latents.load_shard(tmp_path, 0, 0, autoencoder)
    assert again[0] == first[0]
    assert torch.equal(again[1], first[1])
    # Another shard has to be rendered.
    with pytest.raises(NameError):
        latents.load_shard(tmp_path, 1, 0, autoencoder)
    with torch.no_grad():
        next(autoencoder.encoder.parameters()).add_(0.1)
    # So does this one after the autoencoder has changed.
    with pytest.raises(NameError):
        latents.load_shard(tmp_path, 0, 0, autoencoder)


def test_a_damaged_or_foreign_shard_is_rejected(tmp_path: Path, autoencoder: Autoencoder) -> None:
    latents.load_shard(tmp_path, 0, 0, autoencoder)
    [path] = tmp_path.iterdir()
    content, shard = path.read_bytes(), torch.load(path, weights_only=True)
    values: list[Any] = [b"", content[:500], [1], shard.float(), shard[:-1], shard[:, :1]]
    for value in values:
        torch.save(value, path)
        if isinstance(value, bytes):
            path.write_bytes(value)
        message = (
            f"expected the latents of {COUNT} scenes in {path}, found something else; delete it to render"
        )
        with pytest.raises(BadInput, match=message):
            latents.load_shard(tmp_path, 0, 0, autoencoder)


def test_a_damaged_cache_of_classes_is_rejected(tmp_path: Path, autoencoder: Autoencoder) -> None:
    name = f"classes-{latents.fingerprint(autoencoder)}-{train_classes.SCENES_PER_CLASS}.pt"
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(
        BadInput, match=rf"expected the latents of \d+ scenes in .*{name}, found something else"
    ):
        train_classes.latents_of_classes(tmp_path, autoencoder)


def test_another_mix_is_stored_in_another_shard(tmp_path: Path, autoencoder: Autoencoder) -> None:
    default, _ = latents.load_shard(tmp_path, 0, 0, autoencoder)
    cubes, _ = latents.load_shard(tmp_path, 0, 0, autoencoder, {"counting": 1.0})
    assert {prompt.kind for prompt in cubes} == {"counting"} != {prompt.kind for prompt in default}
    assert len(list(tmp_path.iterdir())) == 2


def test_save_grid_places_images_row_by_row(tmp_path: Path) -> None:
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    images = values[:, None, None, None].expand(6, 3, 4, 2).clone()
    images[0, 0] = 1.0  # the red channel
    path = tmp_path / "new" / "grid.png"
    save_grid(images, path, columns=3)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (8, 6, 3)
    corners = pixels[::4, ::2]
    assert corners[..., 1].tolist() == [[0, 64, 128], [191, 255, 255]]
    assert corners[0, 0].tolist() == [255, 0, 0]
    assert (pixels.reshape(2, 4, 3, 2, 3) == corners[:, None, :, None]).all()
