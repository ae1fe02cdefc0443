"""Parsing of one line of JSONL: decode strictly, check, and flatten to a row of a table.

json_decoding: bytes -> a JSON object. example_parsing: a line -> an `Example`, as tokenizing reads
    it, by the table FORMATS. other_formats: rows of other programs. marks: which turns are learnt.
    line_rows: a line -> a flat `LineRow`, as the rules read it. line_table: a range of lines -> a
    polars frame of rows.
"""
