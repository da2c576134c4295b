"""The explorer: a local web app that shows, plays and searches an atlas, its runs, predictions and mistakes.

It reads what other commands wrote and writes one thing: a person's verdicts on a judge, into the run folder. `pages`
says what is shown, `server` what is refused.
"""
