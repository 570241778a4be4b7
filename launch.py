"""Fine-tune MusicGen on a folder of music with captions: what every process of a run does, in order.

python launch.py --dataset DIR
accelerate launch --num_processes 8 launch.py --dataset DIR --model_id large
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import DISK_ERRORS, EXIT_DONE, EXIT_RESUME, EXIT_STORAGE, TrainerError
from trainer.flags.config import Config, parse
from trainer.plan.launcher import read_launch, without_local_rank
from trainer.run.console import Console
from trainer.run.signals import interruptible, time_limit

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from trainer.data.hub_dataset import HubDataset
    from trainer.engine import Ranks
    from trainer.exports.init_from import StartingPoint
    from trainer.model.source import Source
    from trainer.plan.launcher import Launch
    from trainer.plan.plan import Plan
    from trainer.run.checkpoint import Checkpoint, Saver
    from trainer.run.exit_code import ExitCodeFile
    from trainer.run.output_dir import OutputDir
    from trainer.training.judge import Judge
    from trainer.training.loop import Run


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    with Console() as console:
        return exit_code_of_run(argv, console)


def exit_code_of_run(argv: Sequence[str], console: Console) -> int:
    """What `main` does once both streams are the console's."""
    started = time.monotonic()
    try:
        with interruptible():
            config, typed = parse(without_local_rank(argv, os.environ))
            if config.dry_run:
                from trainer.outlook import of_dry_run
                from trainer.plan.dry_run import dry_run

                return dry_run(config, typed, of_dry_run(config))
            with time_limit(config.max_minutes, since=started):
                return start(config, typed, console)
    except KeyboardInterrupt:
        print("stopped: what was encoded or saved is kept; run the same command to continue", file=sys.stderr)
        return EXIT_RESUME
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"error: {error}. Complete checkpoints stay valid: make room, run the same command", file=sys.stderr)
        return EXIT_STORAGE


def start(config: Config, typed: frozenset[str], console: Console) -> int:
    """Hold output_dir for this run, and leave the exit code there, and a log of what the console is told."""
    from trainer.run.exit_code import ExitCodeFile
    from trainer.run.log_file import log_path

    launch = read_launch(os.environ)
    if sys.platform == "darwin" and launch.rank == 0:
        print(
            "macOS: this program computes on the CPU here, which does for --model_id debug; real models need Linux and"
            " an NVIDIA GPU"
        )
    if config.device == "cpu":
        launch = replace(launch, use_cpu=True)
    if launch.use_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch, DeepSpeed and Accelerate each look for GPUs
        os.environ.pop("ACCELERATE_USE_CPU", None)  # by it Accelerate would take MULTI_CPU, whatever the plan says
    os.environ |= allocator_settings(os.environ, platform.release())
    if launch.restarts:
        from trainer.engine.restarts import use_new_store

        use_new_store()  # before output_dir is held: its address tells this launch from others
    log = log_path(config.output_dir, launch.rank)
    with ExitCodeFile(config.output_dir, first=launch.rank == 0, on_held=lambda: console.log_to(log)) as exit_code:
        exit_code.code = run_in_order(config, typed, launch, exit_code)
        if exit_code.code == EXIT_DONE and launch.rank == 0:  # when no other process is left to wait for the network
            from trainer.wiring import push_at_end

            push_at_end(config)
    return exit_code.code


def allocator_settings(environment: Mapping[str, str], kernel: str) -> dict[str, str]:
    """Variables by which PyTorch's allocator lets its blocks grow; none where the user tells it something else.

    Without them, blocks of the lengths of earlier batches stay unused between those in use, and a GPU runs out of
    memory of which it has enough. Not on WSL, whose driver fails at the first block (pytorch/pytorch#192330).

    kernel  the release of the system's kernel
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the older name and the newer
    if "microsoft" in kernel.lower() or any(name in environment for name in names):
        return {}
    return {names[0]: "expandable_segments:True"}


# From here on every process does the same. The parts of trainer are imported where they are used, so that --help,
# --dry_run and refused flags need no torch.


def run_in_order(config: Config, typed: frozenset[str], launch: Launch, exit_code: ExitCodeFile) -> int:
    """Meet, open, plan, prepare, train, export; returns the exit code."""
    from trainer.preflight import check_folders, refuse_early

    refuse_early(config, typed, launch)
    from trainer import wiring
    from trainer.engine import Ranks, build_accelerator, meet, own_device

    device = own_device(launch)
    if launch.world_size > 1:
        meet(device, config.timeout_minutes)
    with Ranks(timeout_seconds=60 * config.timeout_minutes, record=exit_code.record) as ranks:
        ranks.check_equal(flags=config.to_dict())
        if ranks.is_first:
            check_folders(config)
        wiring.refuse_push(config, ranks)
        parts = open_parts(config, typed, launch, ranks)
        plan = plan_together(config, typed, launch, parts, device, ranks)
        exit_code.on_held()  # by rank 0, and the folder is the same one for all
        accelerator = build_accelerator(plan, wiring.engine_settings(config), parts.folder.root)
        prepared = prepare(config, parts, plan, accelerator.device, ranks)
        if prepared is None:
            return EXIT_DONE
        run, judge = prepared
        with wiring.reporter_of(parts.folder, first=ranks.is_first) as report:
            step, stopped_by, saver = train(config, parts, run, judge, accelerator, ranks)
            if step < run.order.steps and not judge.ends_run:
                ranks.say(f"{stopped_by}: saved after step {step} of {run.order.steps}; run the same command again")
                report.exit_code = EXIT_RESUME
            elif ranks.is_first:
                export(config, parts, run, judge, saver, step)
        return report.exit_code


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is made of, opened but not loaded.

    source    the model to train, with the weights to start from
    start     where those weights come from; None where they are --model_id's, or the checkpoint's
    new_word  what --tune_text is about to learn, in words; empty without it
    hub       the data sets of the hub that are used, by dataset and validation
    """

    folder: OutputDir
    checkpoint: Checkpoint | None
    source: Source
    start: StartingPoint | None
    new_word: str
    hub: Mapping[str, HubDataset]


def open_parts(config: Config, typed: frozenset[str], launch: Launch, ranks: Ranks) -> Parts:
    """output_dir with the checkpoint to continue from, if there is one, and the model; no tensor is read.

    A model or data set that has to be downloaded is downloaded by one process, after all names are known to be right.
    """
    from trainer import wiring
    from trainer.engine import find_cluster
    from trainer.exports.first_model import first_model, refuse_stereo_init
    from trainer.exports.init_from import find_starting_point
    from trainer.model.new_word import introduction
    from trainer.model.source import fetch_model, open_model, quiet_libraries
    from trainer.run.output_dir import open_output_dir

    quiet_libraries()
    folder, checkpoint = open_output_dir(config.output_dir, config.resume, first=launch.rank == 0)
    start = None
    # A run that goes on has its trained weights in its checkpoint, and what is frozen in none.
    if config.init_from is not None and (checkpoint is None or not config.selection.everything):
        start = find_starting_point(config.init_from)
    wiring.refuse_before_fetching(config, typed, find_cluster(launch), launch, checkpoint)
    hub = wiring.find_on_hub(config, folder, checkpoint, ranks)
    fetch = partial(fetch_model, config.model_id)
    ranks.once_per_machine("fetching the model", fetch, limit_seconds=wiring.DOWNLOAD_SECONDS)
    source = open_model(config.model_id, fetched=True)
    wiring.refuse_sampling(config, source)
    hub = wiring.fetch_datasets(config, hub, ranks) if hub else hub
    source = first_model(source, start, config.embeddings_in_stereo, config.selection)
    if "stereo_init" in typed:
        refuse_stereo_init(start, source, config.stereo_init)
    new_word = "" if config.new_word is None else introduction(source, config.new_word, config.lr)
    return Parts(folder=folder, checkpoint=checkpoint, source=source, start=start, new_word=new_word, hub=hub)


def plan_together(
    config: Config, typed: frozenset[str], launch: Launch, parts: Parts, device: torch.device, ranks: Ranks
) -> Plan:
    """Lay the run out on the hardware that all processes have, and compare what they must have in common."""
    from trainer import wiring
    from trainer.engine import check_free_memory, find_cluster, say_link_rate
    from trainer.plan.dry_run import with_link
    from trainer.plan.strategies import common_cluster

    step = 0 if parts.checkpoint is None else parts.checkpoint.step
    ranks.check_equal(checkpoint=step)
    found = find_cluster(launch, compiler=config.compile != "0")
    ranks.wait("looking at the hardware")
    cluster = with_link(config, common_cluster(ranks.gather(found)))
    if cluster.unused_gpu:
        ranks.say(f"warning: this run is on the CPU. {cluster.unused_gpu}")
    plan = wiring.plan_of(config, typed, cluster, launch, parts.source, parts.checkpoint)
    ranks.check_equal(plan=plan.to_dict())
    ranks.check_shared(output_dir=parts.folder.root, cache_dir=Path(config.cache_dir))
    ranks.say(plan.describe())
    check_free_memory(plan, device, ranks)
    say_link_rate(cluster, device, ranks)
    if parts.new_word:
        ranks.say(parts.new_word)
    return plan


def prepare(
    config: Config, parts: Parts, plan: Plan, device: torch.device, ranks: Ranks
) -> tuple[Run, Judge] | None:
    """Encode what the cache lacks and put the run together; None where the run is complete already."""
    from trainer import wiring
    from trainer.data import dataset, fates, reading_in_parts
    from trainer.data.inventory import UnusableDataError
    from trainer.run.output_dir import HUB_DATASETS, check_same_run

    settings = wiring.data_settings(config, parts.hub.get("dataset"), parts.hub.get("validation"))
    try:
        settings = reading_in_parts.read_all(parts.hub, settings, parts.source, device, ranks)
        data = dataset.prepare(settings, parts.source, device, ranks)
    except UnusableDataError as error:
        resumes = parts.checkpoint is not None
        raise wiring.shown_on_page(error, config, parts.folder, parts.source, ranks, resumes=resumes) from error
    ranks.say(data.describe())
    identity = wiring.identity_of(config, parts.source, data)
    ranks.check_equal(**{"what the run is made of": identity})
    order = wiring.order_of(config, plan, data)
    if parts.checkpoint is not None:
        check_same_run(parts.checkpoint, identity, lambda report: fates.changed_since(report, data.fates))
    judge = wiring.judge_of(config, order, data, parts.checkpoint, parts.folder, ranks)
    if parts.checkpoint is not None:
        step = parts.checkpoint.step
        # As the first process sees the disk, since a network file system may show it to another one later.
        complete = ranks.gather(wiring.complete_in_words(config, judge, order, step, parts.folder))[0]
        if complete:
            ranks.say(complete)
            return None
        ranks.say(f"resuming from {parts.checkpoint.folder}, step {step} of {order.steps}")
    elif parts.start is not None:
        ranks.say(f"starting from the weights in {parts.start.path}")
    if order.by_duration:
        ranks.say(wiring.crops_in_words(order))
    if parts.source.melody:
        ranks.say(wiring.melodies_in_words(config.melody_drop_rate, data))
    if config.ema_decay is not None:
        ranks.say(wiring.ema_in_words(config.ema_decay, order))
    if config.keep_best:
        ranks.say(wiring.KEEPS_BEST)
    if ranks.is_first:
        parts.folder.write_json("config.json", config.to_dict())
        parts.folder.write_json("plan.json", plan.to_dict())
        if parts.hub:
            parts.folder.write_json(HUB_DATASETS, {name: asdict(found) for name, found in parts.hub.items()})
        fates.write_report(data.fates, parts.folder.report)
        if all(folder.inspected for folder in data.folders):  # the sounds of a prepared folder cannot be shown
            wiring.report_dataset(config, parts.folder, parts.source, data.folders)
    prompts = wiring.sample_prompts_of(config, settings, parts.source, data, device, ranks)
    run = wiring.run_of(config, plan, order, data, identity, parts.folder, parts.source, prompts)
    if ranks.is_first:
        start_step = 0 if parts.checkpoint is None else parts.checkpoint.step
        wiring.record_start(config, run, parts.source, parts.folder, start_step)
        print(wiring.expected_in_words(config, run, parts.source, parts.folder, start_step))
    return run, judge


def train(
    config: Config, parts: Parts, run: Run, judge: Judge, accelerator: Accelerator, ranks: Ranks
) -> tuple[int, str, Saver]:
    """Build the engine and train; returns the steps done, what asked for an early end, and the checkpoints' Saver."""
    from trainer import wiring
    from trainer.engine import Engine, start_trackers
    from trainer.run.checkpoint import Saver
    from trainer.run.metrics import Tracker
    from trainer.run.signals import StopRequest
    from trainer.training import loop

    settings, folder, checkpoint = wiring.engine_settings(config), parts.folder, parts.checkpoint
    wiring.put_aside(folder, checkpoint, ranks)
    engine = Engine(accelerator, ranks, parts.source, run.plan, settings)
    measured = engine.rehearse(loop.worst_case(run), run.plan.accumulation, loop.most_places(run))
    start_step = 0 if checkpoint is None else checkpoint.step
    if checkpoint is not None:
        engine.load(checkpoint)
    if ranks.is_first:
        wiring.mend(judge, folder)
        wiring.record_forecast(config, run, parts.source, folder, measured, start_step)
        print(wiring.measured_in_words(config, run, measured, start_step))
    told = wiring.tell_how_to_listen(config, run.plan)
    saver = Saver(
        folder.checkpoints, rank=ranks.rank, world_size=ranks.world_size, best=folder.best, on_complete=told
    )
    trackers = start_trackers(accelerator, settings, folder, config.to_dict())
    tracker = Tracker(folder.metrics if ranks.is_first else None, start_step=start_step, external=trackers)
    with StopRequest() as stop:
        sample = wiring.sampler_of(config, parts.source, run, engine, folder, tracker, stop)
        step = loop.train(run, engine, saver, tracker, stop, start_step, sample, judge)
        tracker.close()
    if ranks.is_first and (hint := folder.upload_hint()):
        print(hint)
    return step, stop.name or "stopped", saver


def export(config: Config, parts: Parts, run: Run, judge: Judge, saver: Saver, step: int) -> None:
    """Write the trained model from the last checkpoint, or the best one, on the first process."""
    from trainer import wiring
    from trainer.spec.trigger import in_a_shell

    print("exporting ...")
    ending = wiring.ending_of(config, judge, run.order, step)
    saved = saver.last() if ending.exported_step == step else saver.of_step(ending.exported_step)
    wiring.export(config, parts.source, run, saved, parts.folder, ending.validation_loss)
    parts.folder.write_json("finished.json", ending.to_json())
    word = None if config.new_word is None else config.new_word.placeholder.word
    prompt = "..." if config.caption_trigger is None else config.caption_trigger.put_into("...")
    print(parts.folder.closing_message(step, word, in_a_shell(prompt), ending.in_words(), melody=parts.source.melody))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
