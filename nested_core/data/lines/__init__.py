"""One line of JSONL at a time: decoded strictly, checked, and made a row of a table.

json_decoding: bytes -> a JSON object. example_parsing: a line -> an `Example`, as tokenising reads
it, by the table FORMATS. other_formats: rows of other programs. line_rows: a line -> a flat
`LineRow`, as the rules read it. line_table: a range of lines -> a polars frame of rows.
word_ngrams: what finds nearly equal texts. sensitive_data: which texts look as if they held a
secret.
"""
