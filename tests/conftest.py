"""What holds for every test."""

import random
import signal

import numpy as np
import pytest
import torch

# A shell has what it runs in the background ignore interrupts, and nohup has it ignore hang-ups. Programs that tests
# start would inherit both, and tests of interruptions would wait for ever.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)


@pytest.fixture(autouse=True)
def the_same_random_numbers_at_every_run() -> None:
    """What libraries draw from global streams (PEFT its adapters, say) must not decide whether a test passes."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
