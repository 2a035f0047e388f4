"""Campaigns of hostile input: random calls, contexts of other code, damaged files, kills at random moments.

    python -m benchmarks.fuzz [calls|contexts|files|kills ...] [--seconds S] [--seed N] [--count N]

A case is wholly determined by its number, so that ``--case calls/17`` runs one again. Each ends as one of:

- right: the result of the undisturbed or independent computation;
- clear: an error or a remark of ours that says what was expected, and nothing lost in silence;
- undetectable: damage inside an image, or of a digit in a text file, which the format cannot show;
- unclear: any other error, a crash, or a traceback;
- wrong: another result, without a word;
- hung: no end within the campaign's limit.
"""
