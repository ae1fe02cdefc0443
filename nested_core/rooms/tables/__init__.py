"""A person's own table made into a data set that trains as OpenAI's messages would.

workbook.py reads .xlsx, survey.py looks at the columns, chats.py makes chats of rows,
dataset_split.py draws held-out rows, eval_set.py questions of them, and data_set.py does all of it.
"""
