"""The class-conditional sample model: its classes, training loss and score."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from samples.shapes import score_classes, train_classes
from samples.shapes.captions import caption, satisfies
from samples.shapes.classes import CLASSES, prompt_of_class, scene_of_class
from samples.shapes.evaluate import parser_error_line
from samples.shapes.parser import Parser
from samples.shapes.score import Row, judge
from samples.shapes.score_classes import as_text, report
from samples.shapes.train_flow import TrainingRun, with_thinking
from tpx_export import checkpoint
from tpx_export.model import DiT, DiTSpec, ThinkingSpec
from tpx_export.model.class_to_image import ClassToImage
from tpx_runtime.evaluation.statistics import bootstrap
from tpx_runtime.generator import Generator

SHIPPED = Path(train_classes.__file__).with_name("classes.safetensors")
_SPEC = DiTSpec(
    latent_size=(4, 4), width=32, heads=2, blocks=2, classes=len(CLASSES), learned_sigma=False, qk_norm=True
)


def test_classes_are_every_colour_of_every_shape() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 32
    names = [caption(prompt_of_class(class_id)) for class_id in (0, 7, 31)]
    assert names == ["a red cube", "a black cube", "a black cone"]


def test_a_scene_of_a_class_satisfies_only_that_class() -> None:
    rng = random.Random(0)
    for class_id in range(len(CLASSES)):
        scene = scene_of_class(rng, class_id)
        assert [satisfies(scene, prompt_of_class(other)) for other in range(len(CLASSES))].count(True) == 1
        assert satisfies(scene, prompt_of_class(class_id))


def test_the_loss_passes_the_class_labels_and_drops_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    torch.manual_seed(0)
    model, labels = DiT(_SPEC), []
    original = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda x, t, class_id, depth: labels.append(class_id) or original(x, t, class_id, depth),
    )
    data = torch.randn(64, 4, 4, 4).half(), torch.arange(64) % len(CLASSES)
    loss_at = train_classes.diffusion_loss(model, data, TrainingRun(tmp_path, 1, 64, 0, "cpu"), depths=(1,))
    first, repeated, other = loss_at(0), loss_at(0), loss_at(1)
    assert first.item() == repeated.item() != other.item()
    assert len(set(labels[0].tolist()) - {len(CLASSES)}) > 5
    assert 0 < int((torch.cat(labels) == len(CLASSES)).sum()) < 64


def test_untrained_adapters_give_the_outputs_of_the_base() -> None:
    torch.manual_seed(0)
    base = DiT(_SPEC).requires_grad_(False).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.1)
    adapted = with_thinking(base, ThinkingSpec(blocks=(0,), experts=2, rank=2, max_depth=2)).eval()
    x, t, ids = torch.randn(2, 4, 4, 4), torch.tensor([10.0, 900.0]), torch.tensor([0, 3])
    assert torch.allclose(adapted(x, t, ids, 2)[0], base(x, t, ids, 1)[0], atol=1e-6)
    assert all(".thinking." in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_the_score_is_the_share_of_correct_images_by_shape() -> None:
    image = Image.new("RGB", (4, 4))
    rows = [Row(prompt_of_class(c), [image] * 4, [c % 2 == 0, True, True, True]) for c in range(len(CLASSES))]
    result = report(rows)
    assert result["cube"]["classes"] == 8
    assert result["cube"]["images"] == 32
    assert result["overall"]["score"] == pytest.approx(7 / 8)
    low = bootstrap([torch.tensor([1.0, 0.75] * 4).double().numpy()]).low
    assert result["cone"]["low"] == low
    assert "| **overall** | 32 | 128 | 87.5% |" in as_text(result)


def test_the_shipped_checkpoint_generates_its_classes() -> None:
    model = checkpoint.load(SHIPPED)
    assert isinstance(model, ClassToImage)
    assert model.spec.transformer.classes == len(CLASSES) and model.spec.transformer.max_depth == 3
    images_tensor = train_classes.sample(model.transformer.eval(), model.autoencoder.eval(), depth=3)
    pixels = ((images_tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    images, parser, correct = [Image.fromarray(image) for image in pixels], Parser.load(), 0
    for index, class_id in enumerate([*train_classes.PREVIEW_CLASSES, *train_classes.PREVIEW_CLASSES]):
        correct += sum(judge(parser, prompt_of_class(class_id), [images[index]]).right)
    # Of 16. The checkpoint's score is 99.6%.
    assert correct >= 15, correct


def test_the_table_is_printed_with_the_parsers_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = SimpleNamespace(classes=len(CLASSES))
    generator = create_autospec(
        Generator, instance=True, return_value=[Image.new("RGB", (128, 128), "lightgrey")]
    )
    generator.manifest = SimpleNamespace(model=model, sha256="b" * 64)
    monkeypatch.setattr(Generator, "load", lambda bundle, engine: generator)
    json_path = tmp_path / "table.json"
    result = CliRunner().invoke(score_classes.main, ["--seeds", "1", "--json", str(json_path)])
    assert result.exit_code == 0, result.output
    *_, overall, empty, errors = result.stdout.splitlines()
    assert overall.startswith("| **overall** | 32 | 32 | 0.0% |")
    assert (empty, errors) == ("", parser_error_line("colours"))
    assert json.loads(json_path.read_text())["rows"]["overall"]["images"] == 32
