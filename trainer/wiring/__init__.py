"""From the flags (Config) to the settings that each part of a run owns.

Besides this room only trainer/preflight.py, trainer/plan/request.py and trainer/plan/dry_run.py know the flags as a
whole.
"""

from trainer.wiring.best import KEEPS_BEST, complete_in_words, ending_of, judge_of, mend, step_to_export
from trainer.wiring.data import caption_settings, data_settings, fetched_data, find_hub_datasets, treatment
from trainer.wiring.exporting import export
from trainer.wiring.forecasting import expected_in_words, measured_in_words, record_forecast
from trainer.wiring.hub import DOWNLOAD_SECONDS, fetch_datasets, find_on_hub
from trainer.wiring.identity import identity_of, identity_of_captions
from trainer.wiring.planning import plan_of, refuse_before_fetching
from trainer.wiring.reporting import report_dataset, report_settings, shown_on_page
from trainer.wiring.run_report import record_start, reporter_of
from trainer.wiring.sampling import put_aside, refuse_sampling, sample_prompts_of, sampler_of, tell_how_to_listen
from trainer.wiring.sharing import push_at_end, refuse_push
from trainer.wiring.training import (
    crops_in_words,
    ema_in_words,
    engine_settings,
    melodies_in_words,
    model_settings,
    order_of,
    run_of,
    write_step,
)

__all__ = [
    "DOWNLOAD_SECONDS",
    "KEEPS_BEST",
    "caption_settings",
    "complete_in_words",
    "crops_in_words",
    "data_settings",
    "ema_in_words",
    "ending_of",
    "engine_settings",
    "expected_in_words",
    "export",
    "fetch_datasets",
    "fetched_data",
    "find_hub_datasets",
    "find_on_hub",
    "identity_of",
    "identity_of_captions",
    "judge_of",
    "measured_in_words",
    "melodies_in_words",
    "mend",
    "model_settings",
    "order_of",
    "plan_of",
    "push_at_end",
    "put_aside",
    "record_forecast",
    "record_start",
    "refuse_before_fetching",
    "refuse_push",
    "refuse_sampling",
    "report_dataset",
    "report_settings",
    "reporter_of",
    "run_of",
    "sample_prompts_of",
    "sampler_of",
    "shown_on_page",
    "step_to_export",
    "tell_how_to_listen",
    "treatment",
    "write_step",
]
