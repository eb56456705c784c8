"""What a training says about its data before the first step, and which record it names later."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import TWINS, tiny_twin
from tiny_training import make_model, words_of
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from volume_files import values, write_nifti

from medtune import models, training
from medtune.pairs import load_pairs
from medtune.records import convert_pairs, read_records
from medtune.training import preflight

# One of them ends where another begins with a blank: texts that templates trim, or tokenizers join.
CAPTIONS = [
    " Axial CT of the liver.",
    "A lung",
    " Chest radiograph with two lines. ",
    "  MRI.\n\nNormal.",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_vlm) -> Path:
    """A small random model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    make_model(folder, tiny_vlm, experts=False)
    return folder


def write_data(folder: Path, captions: list[str], sizes: dict[int, tuple[int, int]] | None = None):
    """Write records with these captions; pictures have 64 x 64 pixels but for the sizes given."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, caption in enumerate(captions):
        size = (sizes or {}).get(number, (64, 64))
        name = f"images/{number}.png"
        Image.effect_noise(size, 40 + number).convert("RGB").save(folder / name)
        question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        record = {
            "id": f"sample-{number}",
            "images": [name],
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": caption}]}],
        }
        lines.append(json.dumps(record) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


def train(capsys, data: Path, base: Path, **changes) -> tuple[int, str]:
    """Train for one pass; return the exit code and all that was said."""
    settings = {
        "data": data,
        "model_name_or_path": base,
        "output_dir": data / "out",
        "num_train_epochs": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "dtype": "float32",
    }
    capsys.readouterr()
    code = 0
    try:
        training.main(words_of(settings | changes))
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


def one_error(code: int, said: str) -> str:
    """The error of a training that failed: the last line."""
    assert code == 1
    return said.strip().splitlines()[-1]


# ---- templates that trim, or add a blank


@pytest.mark.parametrize("family", sorted(TWINS))
def test_all_families_train_on_captions_that_begin_with_a_blank(tmp_path, capsys, family):
    data = write_data(tmp_path / "data", CAPTIONS)
    code, said = train(capsys, data, tiny_twin(family))
    assert code == 0, said
    log = json.loads((data / "out" / "log.json").read_text())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


@pytest.mark.parametrize("family", sorted(TWINS))
def test_labels_of_another_answer_are_found_in_all_families(tmp_path, family):
    data = read_records(write_data(tmp_path / "data", CAPTIONS))
    processor = models.load_processor(tiny_twin(family))
    collate = training_collator(processor)
    rows = [data[number] for number in range(len(CAPTIONS))]
    batch = collate([dict(row) for row in rows])
    result = training.check_labels(batch, processor, CAPTIONS)
    assert result["rows"] == len(CAPTIONS)
    assert training.check_image_tokens(batch, processor)["pictures"] >= len(CAPTIONS)
    with pytest.raises(ValueError, match="Row 1: the labels are not the answer"):
        training.check_labels(batch, processor, [CAPTIONS[0], "A lungs", *CAPTIONS[2:]])
    # a blank inside an answer is no blank at its edge
    with pytest.raises(ValueError, match="Row 1: the labels are not the answer"):
        training.check_labels(batch, processor, [CAPTIONS[0], "A  lung", *CAPTIONS[2:]])
    with pytest.raises(ValueError, match="the pictures need"):
        training.check_image_tokens(batch | {"input_ids": batch["input_ids"][:, 20:]}, processor)


def training_collator(processor):
    """TRL's own collator."""
    return DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)


# ---- several pictures in a question


def slabs(folder: Path, *, slices: int = 6, size: tuple[int, int] = (64, 64)) -> Path:
    """Records of three pictures each, from two volumes; the second has slices of another size."""
    write_nifti(folder / "a.nii.gz", values(slices, 64, 64))
    write_nifti(folder / "b.nii.gz", values(slices, *size))
    table = folder / "t.csv"
    table.write_text("image,id,caption\na.nii.gz,one,A liver.\nb.nii.gz,two,A lung.\n")
    convert_pairs(load_pairs(table, slab=3), folder / "data", split_by="none")
    return folder / "data"


def test_slabs_are_trained_on(tmp_path, capsys, base):
    data = slabs(tmp_path)
    code, said = train(capsys, data, base)
    assert code == 0, said
    log = json.loads((data / "out" / "log.json").read_text())
    assert [0 < entry["loss"] < 20 for entry in log if "loss" in entry] == [True]


def test_a_slab_that_is_too_long_or_has_an_odd_slice_is_told_before_training(
    tmp_path, capsys, base
):
    (tmp_path / "long").mkdir()
    (tmp_path / "odd").mkdir()
    data = slabs(tmp_path / "long")
    rows = read_records(data)
    processor = models.load_processor(base)
    collate = training_collator(processor)
    longest = max(len(collate([dict(row)])["input_ids"][0]) for row in rows)
    code, said = train(capsys, data, base, max_length=longest - 1)
    assert f"answers are cut by max_length={longest - 1}" in one_error(code, said)
    code, said = train(capsys, data, base, max_length=longest)
    assert code == 0, "all three pictures are counted, and no more"
    code, said = train(capsys, slabs(tmp_path / "odd", size=(2, 600)), base)
    assert "record 'two+2': its picture of 600 x 2 pixels cannot be prepared" in one_error(
        code, said
    )


# ---- answers that max_length cuts


def test_a_late_long_answer_is_told_before_training(tmp_path, capsys, base):
    captions = [f"A liver number {number}." for number in range(12)]
    captions[9] = "A liver. " * 40
    data = write_data(tmp_path / "data", captions)
    code, said = train(capsys, data, base, max_length=70)
    line = one_error(code, said)
    assert "1 of 12 answers are cut by max_length=70, the first in record 'sample-9'" in line
    assert "max_length=null" in line
    assert not (data / "out" / "log.json").exists()
    # what the line advises is enough, and not a token too much
    longest = int(line.partition("or max_length=")[2].split()[0])
    assert "answers are cut" in one_error(*train(capsys, data, base, max_length=longest - 1))
    code, said = train(capsys, data, base, max_length=longest)
    assert code == 0, said


def test_cut_answers_are_learned_when_asked_for(tmp_path, capsys, base):
    data = write_data(tmp_path / "data", ["A liver. " * 40, "A lung.", "MRI."])
    code, said = train(capsys, data, base, max_length=70, allow_cut_answers=True)
    assert code == 0, said
    assert "1 of 3 answers are cut by max_length=70" in said


def test_a_length_that_leaves_nothing_of_an_answer_is_refused(tmp_path, capsys, base):
    data = write_data(tmp_path / "data", CAPTIONS)
    line = one_error(*train(capsys, data, base, max_length=20))
    assert "4 of 4 answers are cut by max_length=20" in line
    line = one_error(*train(capsys, data, base, max_length=20, allow_cut_answers=True))
    assert "record 'sample-0': max_length=20 leaves nothing of its answer" in line


@pytest.mark.parametrize("family", sorted(TWINS))
def test_lengths_are_those_of_the_batch(tmp_path, family):
    """Within the few tokens in which a text may join the tokens around a picture."""
    captions = [*CAPTIONS, "Two\n\nparagraphs."]
    data = read_records(
        write_data(tmp_path / "data", captions, sizes={1: (100, 60), 3: (40, 160), 4: (300, 200)})
    )
    processor = models.load_processor(tiny_twin(family))
    collate = training_collator(processor)
    sizes = preflight.sizes_of_pictures(data)
    assert sizes[3] == [(40, 160)]
    for record in preflight._lengths(processor, data, sizes):
        row = data[record.row]
        batch = collate([dict(row)])
        tokens = batch["input_ids"].shape[1]
        assert record.answer == int((batch["labels"] != -100).sum())
        assert abs(record.all - tokens) <= 2
        assert preflight._exact_length(processor, row, record).all == tokens


# ---- records that the processor refuses


def test_a_strip_is_named_before_training(tmp_path, capsys, base):
    captions = [f"A liver number {number}." for number in range(8)]
    data = write_data(tmp_path / "data", captions, sizes={6: (1200, 5)})
    line = one_error(*train(capsys, data, base))
    assert "record 'sample-6': its picture of 1200 x 5 pixels cannot be prepared" in line
    assert "aspect ratio" in line and "medtune check" in line
    assert not (data / "out" / "log.json").exists()


def test_a_damaged_picture_is_named_before_training(tmp_path, capsys, base):
    data = write_data(tmp_path / "data", CAPTIONS)
    (data / "images" / "2.png").write_bytes(b"no picture")
    line = one_error(*train(capsys, data, base))
    assert "record 'sample-2': a picture cannot be opened" in line
    assert "2.png" not in line.partition("record")[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_is_cut_short_is_named(tmp_path, capsys, base, workers):
    """Its head is sound, so that it shows only when it is decoded."""
    captions = [f"A liver number {number}." for number in range(8)]
    data = write_data(tmp_path / "data", captions)
    file = data / "images" / "6.png"
    file.write_bytes(file.read_bytes()[:2000])
    line = one_error(*train(capsys, data, base, dataloader_num_workers=workers))
    assert "rank 0: record 'sample-6' cannot be prepared: " in line
    assert "truncated" in line and "Traceback" not in line


@pytest.mark.parametrize("workers", [0, 2])
def test_a_record_that_shows_later_is_named(tmp_path, capsys, base, workers):
    """In this process and from a loader process: a picture's mark inside an answer."""
    captions = [f"A liver number {number}." for number in range(8)]
    captions[7] = "A liver <|image_pad|> here."
    data = write_data(tmp_path / "data", captions)
    line = one_error(*train(capsys, data, base, dataloader_num_workers=workers))
    assert "rank 0: record 'sample-7' cannot be prepared: Found 1 <|image_pad|>" in line
    assert "Traceback" not in line and "Caught" not in line


def test_a_batch_that_fails_together_only_keeps_its_error():
    def collate(rows):
        if len(rows) > 1:
            raise RuntimeError("they do not fit together")
        return {"labels": rows[0]["labels"], "input_ids": rows[0]["labels"]}

    named = preflight.NamedRecords(collate, models.load_processor(tiny_twin("qwen3-vl")))
    rows = [{"id": "a", "labels": torch.zeros(1, 1)}, {"id": "b", "labels": torch.zeros(1, 1)}]
    with pytest.raises(RuntimeError, match="fit together"):
        named(rows)
