"""Score a model with lm-evaluation-harness, a dense baseline beside it.

The scores are those of the plain command
  lm_eval run --model hf --model_args pretrained=MODEL,trust_remote_code=True --tasks ...

examples:
  finedeep eval ./llama-finedeep --tasks arc_easy,piqa --baseline ./llama
  finedeep eval ./llama-finedeep --tasks my_task --include-path ./my_tasks --output ./results
"""

import argparse

from .argument_types import names, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `finedeep eval`."""
    parser.add_argument("model", metavar="MODEL", help="a folder or a Hub id, Finedeep or dense")
    parser.add_argument("--tasks", type=names, required=True, metavar="A,B", help="the harness's task or group names")
    parser.add_argument("--baseline", metavar="DENSE", help="a second model, scored on the same samples")
    parser.add_argument("--output", metavar="DIR", help="where to write the harness's results JSON and samples")
    parser.add_argument("--include-path", metavar="DIR", help="a folder with task definitions of your own")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="score only the first N samples of each task")
    parser.add_argument("--batch-size", default="8", metavar="N", help='a number or "auto" (default: 8)')
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU where there is one)")
    parser.add_argument("--dtype", default="auto", help="such as float32 or bfloat16 (default: the checkpoint's own)")
    parser.add_argument("--max-length", type=positive_int, metavar="N", help="tokens (default: the model's own limit)")
    parser.add_argument("--seed", type=int, default=1234, help="for few-shot examples and bootstrap (default: 1234)")


def run(arguments: argparse.Namespace) -> None:
    """Score the models one after the other and print one table."""
    from finedeep.eval import evaluate, side_by_side

    models = {"dense": arguments.baseline} if arguments.baseline else {}
    models["finedeep" if arguments.baseline else "score"] = arguments.model
    results = {}
    for heading, model in models.items():
        results[heading] = evaluate(
            model,
            arguments.tasks,
            include_path=arguments.include_path,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            device=arguments.device,
            dtype=arguments.dtype,
            max_length=arguments.max_length,
            output=arguments.output,
            seed=arguments.seed,
        )
    print(side_by_side(results))
    if arguments.output:
        print(f"\nresults and samples: {arguments.output}")
