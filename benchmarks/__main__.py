"""`make bench`: every measurement, one after the other."""

from benchmarks import finetune, reading

finetune.main()
reading.main()
