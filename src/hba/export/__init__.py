"""The benchmark in the forms of other harnesses, lmms-eval and Inspect. Answers are read and scored by hba itself."""
