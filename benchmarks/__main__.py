"""`make bench`: every measurement, one after the other."""

from benchmarks import finetune, padding, reading

padding.main()
reading.main()
finetune.main()
