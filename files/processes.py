"""Several processes of `accelerate launch`: which one writes, and how all learn of what one has found."""

import os
from datetime import timedelta
from typing import Any

import torch

# By which a launcher tells a process of the others.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def process_number() -> int:
    """This process among all; 0 where there is one."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def is_first_process() -> bool:
    """Whether this is the process that writes and speaks."""
    return process_number() == 0


def are_several() -> bool:
    """Whether there are others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_needed() -> bool:
    """Whether this process has work to do. On CPUs the harness shares nothing out, and the first one goes on alone."""
    if torch.accelerator.is_available():
        return True
    needed = is_first_process()
    if needed:
        for name in LAUNCHED:
            os.environ.pop(name, None)
    return needed


def share(said: Any) -> Any:
    """What the first process says, in all of them: each calls this and waits for the others."""
    if not are_several():
        return said
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # As long as the harness would wait, where nobody has asked for a process group yet: the first to ask decides.
    PartialState(timeout=timedelta(weeks=52))
    return broadcast_object_list([said])[0]
