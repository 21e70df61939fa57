"""A reward for `trl grpo`."""


def various(completions, **rest):  # type: ignore[no-untyped-def]
    """Reward completions of many different characters."""
    return [len(set(str(one))) / 100 for one in completions]
