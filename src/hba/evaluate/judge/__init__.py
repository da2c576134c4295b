"""The LLM judge of free-form answers: social reasoning (SOC), intent (INT), nonverbal communication (NVC).

`items` says what is judged and kept, `prompt` how it is asked and what counts as a verdict, `run` asks for a whole
run, `scores` turns verdicts into scores, `agreement` compares judges with people and each other.
A verdict is never guessed: what cannot be judged is unjudged, and its dataset has no score but bounds.
"""
