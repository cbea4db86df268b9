"""The campaign: commands of the toolkit as its users and its adversaries give them, and four promises about each.

(a) no file of the user's is lost or changed;  (b) no number is silently another one;
(c) nothing hangs and nothing takes a gigabyte; (d) no traceback: exit code 0, 2 with one line `error: …`, or 130.

    python -m tests.fuzz                                          one minute, seed 0: what `make test-slow` runs
    python -m tests.fuzz --minutes 30 --seed 7 --report found.json
    python -m tests.fuzz --only values,kills --count 500          so many cases of each of these parts

Every part is one module with one entry in `campaign.PARTS`; a seed names the cases, the time only how many of them.
Needs Linux and Hypothesis. A finding names the promise, what was seen, and the command that shows it.
"""
