"""One line of JSONL at a time: decoded strictly, checked, and made a row of a table.

decoding: bytes -> a JSON object. examples: a line -> an `Example`, as tokenising reads it. rows: a
line -> a flat `Row`, as the rules read it. line_table: a range of lines -> a polars frame of rows.
sensitive_data: which texts look as if they held a secret.
"""
