"""The configuration: YAML and flags, read strictly into a frozen `FineTuneConfig`.

schema.py has mlx-lm's keys and the checks across sections; sections.py has the sections,
section_base.py their base class. A key is one line there: key_properties.py derives facts from it,
resume.py which keys may differ on a resume. loading.py reads the file and the flags;
error_messages.py explains what is refused; names.py has the patterns of names.
"""
