"""Examples as tokens: what mlx-lm makes of each, computed on all cores, kept in mapped files.

example_encoding makes the tokens and target spans of one example, parallel_tokenization those of
all splits. shown_texts looks for the texts of a row in what the chat template renders, and
control_tokens for control tokens in them. tokenized_split is the result in memory and on disk, and
as shown to a person. template_time_limit bounds what a chat template may take, and tokenizer_source
names a tokenizer for another process.
"""
