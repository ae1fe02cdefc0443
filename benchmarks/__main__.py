"""`make bench`: every measurement, one after the other."""

from benchmarks import finetune, padding

padding.main()
finetune.main()
