"""What layers have in common is computed once, and only where it is the same."""

import torch

from refreekv.pruning.once import Once


def test_it_is_for_the_very_same_tensors():
    once, asked = Once(4), []

    def ask(given, key):
        return once.of(given, key, lambda: (asked.append(key), torch.tensor(len(asked)))[1:])[0]

    one, same = torch.arange(3), torch.arange(3)
    first = ask((one, None), "a")
    assert ask((one, None), "a") is first
    assert ask((same, None), "a") is not first
    assert ask((one, same), "a") is not first
    assert ask((one, None), "b") is not first
    assert asked == ["a", "a", "a", "b"]
    assert ask((one, None), "a") is first


def test_it_forgets_what_came_first():
    once, given = Once(2), [torch.arange(3) for _ in range(3)]
    first = [once.of((one,), 0, lambda: (torch.zeros(1),))[0] for one in given]
    again = [once.of((one,), 0, lambda: (torch.zeros(1),))[0] for one in reversed(given)]
    assert again[0] is first[2]
    assert again[1] is first[1]
    assert again[2] is not first[0]


def test_what_it_gives_may_be_used_anywhere():
    once, given = Once(2), torch.arange(3)
    with torch.inference_mode():
        made = once.of((given,), 0, lambda: (given + 1,))[0]
    assert not made.is_inference()
