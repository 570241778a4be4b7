"""Every flag is read, checked and kept; what cannot work is refused by name, and never with an exit."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import generate
from trainer.errors import EXIT_USAGE, ConfigError
from trainer.flags.config import Config, config_from_dict, parse
from trainer.flags.flag import settings

# One text and its value for each flag, none of them the default.
OTHER_VALUES: dict[str, tuple[str, object]] = {
    "dataset_path": ("music", "music"),
    "sample_every": ("50", 50),
    "sample_prompts": ("rock|techno", "rock|techno"),
    "sample_seconds": ("5", 5.0),
    "sample_guidance": ("1", 1.0),
    "sample_temperature": ("0.9", 0.9),
    "sample_top_k": ("0", 0),
    "sample_continue": ("2", 2.0),
    "keep_best": ("1", True),
    "early_stop": ("3", 3),
    "export": ("last", "last"),
    "push_to_hub": ("ann/my-style", "ann/my-style"),
    "public": ("1", True),
    "stereo": ("1", True),
    "stereo_init": ("copied", "copied"),
    "melody_rate": ("0.25", 0.25),
    "stems": ("mix", "mix"),
    "no_label": ("1", True),
    "segment_seconds": ("12.5", 12.5),
    "min_seconds": ("2", 2.0),
    "trim_silence": ("1", True),
    "loudness": ("-14", -14.0),
    "sample_by": ("duration", "duration"),
    "dataset_config": ("short", "short"),
    "dataset_split": ("test", "test"),
    "dataset_revision": ("v1.0", "v1.0"),
    "audio_column": ("sound", "sound"),
    "validation": ("held_out", "held_out"),
    "validation_split": ("validation", "validation"),
    "cache_dir": ("encoded", "encoded"),
    "code_views": ("640", 640),
    "word_dropout": ("0.25", 0.25),
    "caption_variants": ("5", 5),
    "caption_lines": ("1", True),
    "trigger": ("my-style", "my-style"),
    "trigger_place": ("after", "after"),
    "captions": ("json,text,metadata,template", "json,text,metadata,template"),
    "caption_column": ("about", "about"),
    "caption_template": ("{genre},{title}", "{genre},{title}"),
    "default_caption": ("slow", "slow"),
    "caption": ("slow", "slow"),
    "merge_metadata": ("0.25", 0.25),
    "merge_drop_caption": ("0.5", 0.5),
    "merge_drop_field": ("0.4", 0.4),
    "rehash": ("true", True),
    "model_id": ("facebook/musicgen-large", "facebook/musicgen-large"),
    "init_from": ("models", "models"),
    "dropout": (".1", 0.1),
    "tune_text": ("1", True),
    "placeholder": ("<my-style>", "<my-style>"),
    "placeholder_vectors": ("2", 2),
    "init_word": ("jazz", "jazz"),
    "lr": ("3e-5", 3e-5),
    "lr_schedule": ("linear", "linear"),
    "warmup_steps": ("0", 0),
    "min_lr_ratio": ("0.1", 0.1),
    "weight_decay": ("0", 0.0),
    "max_grad_norm": ("0.5", 0.5),
    "freeze": ("embeddings,layers.0-3", "embeddings,layers.0-3"),
    "lora_rank": ("16", 16),
    "lora_alpha": ("8", 8.0),
    "lora_dropout": ("0.1", 0.1),
    "lora_targets": ("q_proj,v_proj", "q_proj,v_proj"),
    "base_bits": ("4", 4),
    "ema_decay": ("0.99", 0.99),
    "optimizer": ("adamw8bit", "adamw8bit"),
    "epochs": ("3", 3),
    "max_steps": ("1000", 1000),
    "batch_size": ("8", 8),
    "grad_acc": ("1", 1),
    "global_batch": ("64", 64),
    "use_cfg": ("1", True),
    "cfg_rate": ("0.2", 0.2),
    "seed": ("7", 7),
    "device": ("cuda", "cuda"),
    "strategy": ("zero3", "zero3"),
    "offload_optimizer": ("1", True),
    "mixed_precision": ("no", "no"),
    "gradient_checkpointing": ("selective", "selective"),
    "compile": ("1", "1"),
    "timeout_minutes": ("2.5", 2.5),
    "dry_run": ("1", True),
    "gpus": ("8", 8),
    "nodes": ("2", 2),
    "gpu_memory_gib": ("40", 40.0),
    "gpu_name": ("H100", "H100"),
    "link_gbps": ("400", 400.0),
    "output_dir": ("out", "out"),
    "save_step": ("500", 500),
    "checkpoint_minutes": ("7.5", 7.5),
    "max_minutes": ("90", 90.0),
    "resume": ("no", "no"),
    "use_wandb": ("1", True),
    "wandb_project": ("band", "band"),
    "use_tensorboard": ("1", True),
    "log_steps": ("10", 10),
    "validation_steps": ("50", 50),
}
# Those that are refused beside no_label, and of which only one may be typed.
OF_CAPTIONS = frozenset({
    "word_dropout", "caption_variants", "caption_lines", "captions", "caption_column", "caption_template",
    "default_caption", "merge_metadata", "merge_drop_caption", "merge_drop_field",
})
OF_LORA = frozenset({"lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "base_bits"})
OF_A_TRIGGER = frozenset({"trigger", "trigger_place"})  # refused beside a new word
OF_A_WORD = frozenset({"tune_text", "placeholder", "placeholder_vectors", "init_word"})
TOGETHER = [
    {name: texts for name, texts in OTHER_VALUES.items() if name not in without}
    for without in (
        OF_CAPTIONS | OF_A_WORD | {"freeze", "caption"},
        OF_LORA | OF_A_WORD | {"no_label", "caption"},
        OF_LORA | OF_A_TRIGGER | {"no_label", "freeze", "caption"},
        OF_LORA | OF_A_WORD | OF_CAPTIONS | {"no_label"},
    )
]


def config_of(*argv: str) -> Config:
    return parse(["--dataset", "music", *argv])[0]


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


def test_the_flags_of_the_first_system_keep_their_defaults() -> None:
    config = config_of()
    assert config.dataset_path == "music"
    assert (config.model_id, config.lr, config.epochs, config.save_step) == ("small", 1e-5, 100, None)
    assert (config.weight_decay, config.grad_acc, config.warmup_steps, config.batch_size) == (1e-5, 2, 16, 4)
    assert not any((config.use_wandb, config.no_label, config.tune_text, config.use_cfg))


def test_the_table_of_this_test_holds_every_flag() -> None:
    assert set(OTHER_VALUES) == {field.name for field in dataclasses.fields(Config)}
    config = config_of()
    assert all(
        getattr(config, name) != value for name, (_, value) in OTHER_VALUES.items() if name[:7] != "dataset"
    )


def test_of_a_flag_given_twice_the_last_one_wins() -> None:
    config, _ = parse(["--dataset", "a", "--lr", "1", "--dataset_path", "b", "--lr=2"])
    assert (config.dataset_path, config.lr) == ("b", 2.0)


@pytest.mark.parametrize("values", TOGETHER, ids=["no_label and lora", "captions and freeze", "a word", "one caption"])
@pytest.mark.parametrize(
    "spelling", ["--{name}={text}", "--{name} {text}", "--{dashed}={text}", "--{dashed} {text}"]
)
def test_every_flag_is_read_in_every_spelling(spelling: str, values: dict[str, tuple[str, object]]) -> None:
    words = [spelling.format(name=name, dashed=name.replace("_", "-"), text=text) for name, (text, _) in values.items()]
    config, typed = parse(" ".join(words).split(" "))
    assert {name: getattr(config, name) for name in values} == {n: v for n, (_, v) in values.items()}
    assert typed == set(values)
    for field in dataclasses.fields(Config):
        if field.default is not dataclasses.MISSING and field.default is not None:
            assert type(getattr(config, field.name)) is type(field.default)


def test_only_flags_that_were_stated_count_as_typed() -> None:
    assert parse(["--dataset", "music", "--batch_size", "4"])[1] == {"dataset_path", "batch_size"}


@pytest.mark.parametrize(("text", "value"), [("0", False), ("1", True), ("false", False), ("True", True)])
def test_switches_take_numbers_and_words(text: str, value: bool) -> None:
    assert config_of(f"--use_wandb={text}").use_wandb is value
    assert config_of("--use_wandb", text).use_wandb is value


@pytest.mark.parametrize("after", [(), ("--lr", "1")], ids=["at the end", "before a flag"])
def test_a_bare_switch_is_1(after: tuple[str, ...]) -> None:
    switches = [s for s in settings(Config).values() if s.kind is bool] + [settings(Config)["compile"]]
    assert len(switches) > 5
    for setting in switches:
        needs = {"caption_lines": ["--no_label=0"], "keep_best": ["--validation=0.1"]}
        needs |= {"public": ["--push_to_hub=ann/x"]}
        beside = needs.get(setting.name, [])
        config, typed = parse(["--dataset", "music", *beside, f"--{setting.name}", *after])
        assert getattr(config, setting.name) in (True, "1") and setting.name in typed
    assert config_of("--gradient_checkpointing", *after).gradient_checkpointing == "1"


PATHS = ("dataset_path", "cache_dir", "output_dir", "model_id", "init_from", "resume", "validation")


def test_home_and_variables_stand_for_what_a_shell_would_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right values are the shell's own, of words where no `=` keeps it from expanding `~`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home $HOME"))  # a home folder is not expanded again
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    texts = ("~/x", "~", "$SCRATCH/x", "${SCRATCH}_2/x", "~/$SCRATCH/a", "/a/~/b", "a~", "x.$", "./~")
    script = "; ".join(f"printf '%s\\n' {text}" for text in texts)
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    file = tmp_path / "flags.json"
    for name in PATHS:
        assert [settings(Config)[name].read(text) for text in texts] == shown
        beside = [] if name == "dataset_path" else ["--dataset", "music"]
        file.write_text(json.dumps({name: texts[0]}))
        for argv in (["--config", str(file)], [f"--{name}={texts[0]}"]):
            assert getattr(parse([*beside, *argv])[0], name) == shown[0], argv


def test_every_flag_that_may_be_a_path_expands() -> None:
    found = {setting.name for setting in settings(Config).values() if setting.flag.path}
    assert found == set(PATHS)
    assert config_of("--placeholder=<x>", "--tune_text", "--init_word=$HOME").init_word == "$HOME"


def test_the_file_of_flags_is_found_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("lr: 0.5")
    assert config_of("--config=~/run.yaml").lr == 0.5


def test_paths_of_the_scripts_expand_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    names = ("model", "base", "text_embedding", "prompts", "output")
    flags = generate.read_flags([f"--{name}=~/$SCRATCH" for name in names])
    assert {getattr(flags, name) for name in names} == {"/home/me//scratch"}


def test_what_no_folder_is_known_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setenv("EMPTY", "")
    assert "NOT_SET is not set" in refusal("--dataset", "music", "--output_dir=$NOT_SET/x")
    assert "EMPTY is empty" in refusal("--dataset", "music", "--output_dir=$EMPTY/x")
    assert "./~nobody-here/x" in refusal("--dataset", "music", "--output_dir=~nobody-here/x")
    assert config_of("--output_dir=cash$$ 5$").output_dir == "cash$ 5$"


def test_a_dollar_sign_in_the_name_of_what_is_there_is_no_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AP", raising=False)
    folder = tmp_path / "A$AP"
    folder.mkdir()
    assert config_of(f"--output_dir={folder}").output_dir == str(folder)
    assert "AP is not set" in refusal("--dataset", "music", f"--output_dir={folder}/new")
    monkeypatch.setenv("AP", "x")
    assert config_of(f"--output_dir={folder}").output_dir == str(tmp_path / "Ax")  # a variable that is set comes first


def test_none_unsets_an_optional_flag() -> None:
    assert config_of("--max_steps", "none").max_steps is None
    assert "--epochs none cannot be used" in refusal("--dataset", "music", "--epochs", "none")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--datset music", ["--datset is no flag", "Did you mean --dataset?"]),
        ("--dataset music --batchsize 2", ["--batchsize is no flag", "Did you mean --batch_size?"]),
        ("--dataset music --xyzzy 2", ["--xyzzy is no flag", "--help"]),
        ("--lr 1e-5", ["--dataset must be given"]),
        ("--dataset music --lr", ["--lr has no value", "a number above 0"]),
        ("--dataset music --no_label my_music", ["--no_label my_music", "0 or 1"]),
        ("my_music", ["'my_music' belongs to no flag", "--dataset my_music"]),
        ("--lr 1e-4 my music", ["--dataset 'my music'"]),
        ("-x", ["'-x' belongs to no flag", "--name value"]),
        ("--dataset my music", ["'music' belongs to no flag", "spaces"]),
        ("--dataset music --resume=", ["--resume ''", "not empty"]),
        ("--dataset music --use_wandb=2", ["--use_wandb 2", "0 or 1"]),
        ("--dataset music --lr_schedule cos", ["--lr_schedule cos", "cosine, linear or constant"]),
        ("--dataset music --mixed_precision fp8", ["--mixed_precision fp8", "auto, no, bf16 or fp16"]),
        ("--dataset music --epochs 1.5", ["--epochs 1.5", "a whole number of 1 or more"]),
        ("--dataset music --max_steps 0", ["--max_steps 0", "a whole number of 1 or more, or none"]),
    ],
)
def test_a_refusal_names_what_was_given_and_what_would_work(argv: str, parts: list[str]) -> None:
    message = refusal(*argv.split())
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("lr", "0 -1e-5 nan inf -inf fast"),
        ("weight_decay", "-1 nan"),
        ("max_grad_norm", "0 -1 inf"),
        ("min_lr_ratio", "-0.1 1.1"),
        ("dropout", "-0.1 1"),
        ("placeholder_vectors", "0 65"),
        ("cfg_rate", "0 1 -0.1"),
        ("segment_seconds", "0.9 300.1 nan"),
        ("min_seconds", "0 -1"),
        ("code_views", "0 641 1.0"),
        ("checkpoint_minutes", "0 -5"),
        ("max_minutes", "0 -5"),
        ("timeout_minutes", "0 -1"),
        ("gpus", "0 1.5"),
        ("nodes", "0"),
        ("gpu_memory_gib", "0 inf"),
        ("link_gbps", "0 inf"),
        ("epochs", "0 -1"),
        ("max_steps", "0 -1"),
        ("batch_size", "0 -4"),
        ("grad_acc", "0"),
        ("global_batch", "0"),
        ("warmup_steps", "-1"),
        ("save_step", "0"),
        ("log_steps", "0"),
        ("validation_steps", "0"),
        ("seed", "-1 4294967296"),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, texts: str) -> None:
    for text in texts.split():
        assert f"--{name} {text} cannot be used" in refusal("--dataset", "music", f"--{name}", text)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--placeholder <x>", ["--placeholder has no effect", "--tune_text 1"]),
        ("--placeholder_vectors 2", ["--placeholder_vectors has no effect", "--tune_text 1"]),
        ("--tune_text 1 --freeze heads", ["--freeze cannot be used with --tune_text 1", "remove one"]),
        ("--tune_text 1 --lora_rank 4", ["--lora_rank cannot be used with --tune_text 1", "remove one"]),
        ("--trigger_place after", ["--trigger_place has no effect without --trigger", "in my-style"]),
        ("--trigger ...", ["--trigger '...'", "has no word in it"]),
        ("--trigger in\u0007style", ["control characters"]),
        (f"--trigger {'x' * 201}", ["201 characters", "200 at most"]),
        ("--trigger style --tune_text 1", ["--trigger cannot be used with --tune_text 1", "<music-style>"]),
        ("--sample_prompts rock|jazz", ["--sample_prompts has no effect without --sample_every", "--sample_every 100"]),
        ("--sample_top_k 5", ["--sample_top_k has no effect without --sample_every"]),
        ("--sample_every 5 --sample_continue 9.95", ["--sample_continue 9.95 leaves less than 0.1 s"]),
        ("--sample_every 5 --sample_continue 10", ["--sample_continue 10", "--sample_seconds 10", "raise the second"]),
        ("--init_word rock", ["--init_word has no effect", "--tune_text 1"]),
        ("--tune_text 1 --placeholder style", ["--placeholder style", "angle brackets", "'<my-style>'"]),
        ("--tune_text 1 --placeholder <stil-ä>", ["--placeholder <stil-ä>", "letters a to z"]),
        ("--cfg_rate 0.2", ["--cfg_rate 0.2", "--use_cfg 1"]),
        ("--min_seconds 20 --segment_seconds 10", ["--min_seconds 20", "--segment_seconds 10"]),
        ("--min_lr_ratio 0.1 --lr_schedule constant", ["--min_lr_ratio", "--lr_schedule constant"]),
        ("--validation_steps 10", ["--validation_steps", "--validation 0.1"]),
        ("--wandb_project band", ["--wandb_project band has no effect", "--use_wandb 1"]),
        ("--wandb_project band --use_wandb 0", ["--wandb_project band has no effect", "--use_wandb 1"]),
        ("--warmup_steps 20 --max_steps 10", ["--warmup_steps 20", "--max_steps 10"]),
        ("--gpus 4", ["--gpus", "--dry_run 1", "--num_processes"]),
        ("--nodes 2", ["--nodes", "--dry_run 1"]),
        ("--gpu_memory_gib 24", ["--gpu_memory_gib", "--dry_run 1"]),
        ("--gpus 4 --dry_run --device cpu", ["--gpus has no effect with --device cpu"]),
        ("--validation 1", ["--validation 1 ", "below 1"]),
        ("--validation -0.1", ["--validation -0.1 ", "below 1"]),
        ("--validation nan", ["--validation nan ", "below 1"]),
        ("--validation music", ["--validation music", "overlap"]),
        ("--validation music/held_out", ["--validation music/held_out", "overlap"]),
        ("--output_dir music", ["--output_dir music", "inside --dataset music"]),
        ("--output_dir ./music/models", ["--output_dir ./music/models", "inside"]),
        ("--cache_dir other/../music/cache", ["--cache_dir", "inside --dataset music"]),
    ],
)
def test_flags_that_contradict_each_other_are_refused(argv: str, parts: list[str]) -> None:
    message = refusal("--dataset", "music", *argv.split())
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "argv",
    [
        "--epochs 3 --max_steps 10",  # max_steps is a cap
        "--max_steps 3",  # the default warmup may be longer
        "--use_cfg 1 --cfg_rate 0.3",
        "--output_dir music_models --cache_dir music-cache",  # beside the dataset: only the names begin alike
        "--cache_dir models/cache",
        "--validation held_out --validation_steps 5",
        "--validation 0.1 --validation_steps 5",
        "--warmup_steps 10 --max_steps 10",
        "--lr_schedule constant",
        "--dry_run 1",
        "--dry_run 1 --nodes 2 --gpus 8 --gpu_memory_gib 40",
    ],
)
def test_combinations_that_work_are_accepted(argv: str) -> None:
    config_of(*argv.split())


def test_captions_are_dropped_only_with_use_cfg() -> None:
    assert config_of().caption_drop_rate == 0.0
    assert config_of("--use_cfg", "1").caption_drop_rate == 0.1
    assert config_of("--use_cfg", "1", "--cfg_rate", "0.25").caption_drop_rate == 0.25


def test_validation_is_a_share_or_a_folder() -> None:
    cases = {"0": (0.0, None), "0.2": (0.2, None), "held_out": (0.0, "held_out"), "./2024": (0.0, "./2024")}
    for text, expected in cases.items():
        config = config_of("--validation", text)
        assert (config.validation_share, config.validation_folder) == expected


YAML = """
dataset: music   # an alias
lr: 1e-4
use_wandb: true
resume: no
mixed_precision: no
max_steps: null
wandb-project: "2024"
"""
JSON = """{
\t"dataset": "music", "lr": 1e-4, "use_wandb": true, "resume": "no", "mixed_precision": "no",
\t"max_steps": null, "wandb-project": "2024"
}"""


@pytest.mark.parametrize(("suffix", "text"), [("yaml", YAML), ("yml", YAML), ("json", JSON)])
def test_a_file_of_flags_reads_like_the_same_command_line(tmp_path: Path, suffix: str, text: str) -> None:
    file = tmp_path / f"run.{suffix}"
    file.write_text(text)
    words = (
        "--dataset music --lr 1e-4 --use_wandb 1 --resume no --mixed_precision no --max_steps none "
        "--wandb_project 2024"
    )
    assert parse(["--config", str(file)]) == parse(words.split())


def test_a_typed_flag_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("dataset_path: music\nlr: 1e-4\nepochs: 5\n")
    config, typed = parse([f"--config={file}", "--lr", "1e-3", "--seed", "1"])
    assert (config.lr, config.epochs, config.seed) == (1e-3, 5, 1)
    assert typed == {"dataset_path", "lr", "epochs", "seed"}


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("run.yaml", "batchsize: 4", ["batchsize is no flag", "Did you mean batch_size?"]),
        ("run.yaml", "lr: true", ["--lr true", "a number above 0"]),
        ("run.yaml", "lr: [1, 2]", ["lr", "one value"]),
        ("run.yaml", "lr: {a: 1}", ["lr", "one value"]),
        ("run.yaml", "lr:", ["--lr none", "a number above 0"]),
        ("run.yaml", "lr: 1\nlr: 2", ["lr is given twice"]),
        ("run.yaml", "use_cfg: maybe", ["--use_cfg maybe", "0 or 1"]),
        ("run.yaml", "config: other.yaml", ["cannot name another"]),
        ("run.yaml", "lr: [", ["is not YAML", "line 1"]),
        ("run.yaml", "- lr", ["one flag a line"]),
        ("run.yaml", "just text", ["one flag a line"]),
        ("run.json", '{"epochs": 1.5}', ["--epochs 1.5", "a whole number"]),
        ("run.json", '{"epochs": true}', ["--epochs true", "a whole number"]),
        ("run.json", '{"lr": NaN}', ["--lr NaN", "a number above 0"]),
        ("run.json", '{"lr": {"a": 1}}', ["lr", "one value"]),
        ("run.json", '{"lr": 1, "lr": 2}', ["lr is given twice"]),
        ("run.json", '{"lr": ', ["is not JSON", "line 1"]),
        ("run.json", "[1]", ["one object of flags"]),
        ("run.toml", "lr = 1", [".yaml, .yml or .json"]),
    ],
)
def test_a_bad_file_of_flags_is_refused_by_name(
    tmp_path: Path, name: str, text: str, parts: list[str]
) -> None:
    file = tmp_path / name
    file.write_text(text)
    message = refusal("--dataset", "music", "--config", str(file))
    assert all(part in message for part in [str(file), *parts]), message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal("--dataset", "music", "--config", str(tmp_path / "absent.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read" in refusal("--dataset", "music", "--config", str(tmp_path / "folder.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal("--dataset", "music", "--config", str(tmp_path / "binary.yaml"))
    assert "--config has no value" in refusal("--dataset", "music", "--config")


def test_a_config_survives_json() -> None:
    stated = [[f"--{name}={text}" for name, (text, _) in values.items()] for values in TOGETHER]
    for words in (["--dataset", "music"], *stated):
        config = parse(words)[0]
        values = json.loads(json.dumps(config.to_dict()))
        assert config_from_dict(values) == config
        assert set(values) == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"batchsize": 4}, ["batchsize is no flag", "batch_size"]),
        ({"epochs": True}, ["--epochs True", "a whole number"]),
        ({"epochs": 2.0}, ["--epochs 2.0", "a whole number"]),
        ({"use_wandb": 1}, ["--use_wandb 1", "0 or 1"]),
        ({"lr": "1e-5"}, ["--lr 1e-5", "a number"]),
        ({"model_id": None}, ["--model_id None", "a text"]),
        ({"placeholder": "<a b>"}, ["--placeholder <a b>", "angle brackets"]),
    ],
)
def test_a_dict_of_wrong_values_is_refused(changes: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(config_of().to_dict() | changes)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_dict_may_lack_flags_that_have_a_default() -> None:
    assert config_from_dict({"dataset_path": "music", "lr": 1}) == Config(dataset_path="music", lr=1.0)
    with pytest.raises(ConfigError, match="dataset_path is missing"):
        config_from_dict({"lr": 1e-5})


def test_a_config_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="--lr -1"):
        Config(dataset_path="music", lr=-1.0)


def test_random_command_lines_give_a_config_or_a_config_error() -> None:
    draw = random.Random(0)
    names = [f"--{name}" for name in settings(Config)] + ["--dataset", "--config", "--", "-x", "--nope", ""]
    texts = ["0", "1", "-1", "1.5", "nan", "none", "true", "music", "\u00e9", "--", "--lr", "=", "", " "]
    outcomes = {"config": 0, "error": 0}
    for _ in range(80):
        words = ["--dataset=music"]
        for _ in range(draw.randint(0, 2)):
            name, text = draw.choice(names), draw.choice(texts)
            words += [f"{name}={text}"] if draw.random() < 0.5 else [name, text]
        try:
            assert isinstance(parse(words)[0], Config)
            outcomes["config"] += 1
        except ConfigError as error:
            assert len(str(error)) > 20
            outcomes["error"] += 1
    assert min(outcomes.values()) > 15, outcomes


def test_help_shows_every_flag_by_section_with_its_default() -> None:
    script = "import sys; from trainer.flags.config import parse; parse(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for setting in settings(Config).values():
        assert f"--{setting.name} {setting.metavar}" in shown
        assert f"{setting.flag.group} options" in shown
    assert "(default: 1e-05)" in shown and "--dataset STR" in shown and "--config FILE" in shown


def test_reading_flags_loads_no_heavy_library() -> None:
    script = (
        "import sys; from trainer.flags.config import parse; parse(['--dataset', 'music', '--lr', '1e-4'])\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize("flag", ["--lora_alpha=8", "--lora_dropout=0.1", "--lora_targets=fc1"])
def test_settings_of_adapters_without_adapters_are_refused(flag: str) -> None:
    assert "has no effect without --lora_rank" in refusal("--dataset", "music", flag)
    assert config_of(flag, "--lora_rank", "4").selection.lora is not None


@pytest.mark.parametrize("flag", ["--keep_best=1", "--early_stop=3"])
def test_comparing_steps_without_data_to_validate_on_is_refused(flag: str) -> None:
    assert "without data to validate on" in refusal("--dataset", "music", flag)
    assert config_of(flag, "--validation=0.1") == config_of(flag, "--validation", "0.1")


def test_which_step_to_export_is_refused_where_there_is_one_only() -> None:
    for value in ("best", "last"):
        assert "has no effect without --keep_best 1" in refusal("--dataset", "music", f"--export={value}")
    assert config_of("--export=last", "--keep_best", "--validation=0.1").export == "last"
