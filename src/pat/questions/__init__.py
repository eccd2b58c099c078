"""The paper's 14 tasks as questions: their datasets, their rows, and the authors' wording around them."""
