"""The text side of a bundle: its tokenizer, its chat templates, and the tokens that end an answer."""
