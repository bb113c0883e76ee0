"""A run as one self-contained page, and as a table in the terminal.

`write_report(out_dir)` reads what a pipeline of stages left behind and writes
`out_dir/report.html`; `write_run_report(run_dir)` does so for the curves of a single run. The page
loads nothing: style, script and charts are inside it. `agentx.report.row` draws a row of a batch
in the same way.

out_dir/results.json

    {
      "seed": 0,
      "split": "held-out",
      "command": "agentx quickstart --seed 0",
      "hardware": "2 CPU cores, 4 GiB",
      "versions": {"agentx": "0.1.0", "jax": "0.10.2"},
      "stages": [
        {
          "name": "grpo", "seconds": 141.0, "steps": 45, "tokens": 1200000, "tokens_per_s": 8510.6,
          "scores": {
            "success": {"value": 0.676, "low": 0.616, "high": 0.73, "count": 173, "total": 256}
          },
          "episodes_truncated": 3, "episodes_crashed": 0
        }
      ],
      "sampler_trainer_logprob_difference": {"mean": 1e-6, "max": 2e-5},
      "promise": {"before": "sft", "after": "grpo", "gain": 0.172, "low": 0.105, "high": 0.238,
                  "required": 0.12, "met": true},
      "ablation": {"name": "tool objectives", "stages": []}
    }

Only "stages", and in each of them "name", must be there; whatever else is missing or null is left
out of the page. A score is what `agentx.eval.scores.Score.to_json` gives: success, valid_call,
recovery, loop, new_tool, or any other. "promise" compares the success of two stages on the same
tasks. "ablation" holds the stages of a second pipeline that differs only in going without what is
named; its last stage with scores is compared with the one of the same name above.

out_dir/<stage name>/metrics.jsonl    see `agentx.metrics`; optional

out_dir/trajectories.json             optional; `trajectory_record` makes one entry

    [{"title": "a time-out, and the retry", "stage": "grpo", "task": "Who ...?", "reward": 1.0,
      "outcome": "solved",
      "tokens": [{"text": "search", "id": 731, "role": "call", "origin": "sampled", "outcome": "ok",
                  "weight": 1.0, "advantage": 0.83, "logprob": -0.02}]}]

Advantage and logprob are null where there is none.
"""

from agentx.report.page import write_report, write_run_report
from agentx.report.table import print_stage_table
from agentx.report.tokens import trajectory_record

__all__ = ["print_stage_table", "trajectory_record", "write_report", "write_run_report"]
