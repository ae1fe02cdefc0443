"""The configuration: YAML and flags, read strictly into a frozen `FineTuneConfig`.

schema.py has mlx-lm's keys and what sections ask of each other; sections.py has the sections,
section_base.py their base class. A key is one line there: key_properties.py says what follows from
it, resume.py what may differ on a resume. loading.py reads the file and the flags,
error_messages.py explains what is refused, other_tools.py knows the words of other trainers, and
names.py has the patterns of names.
"""
