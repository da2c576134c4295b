"""The explorer: a local web app that shows, plays and searches an atlas, its runs, predictions and mistakes.

It reads what other commands wrote and writes one thing: a person's verdicts on a judge, into the run folder. See `app`
for the pages and `guard` for what it refuses.
"""
