"""`make bench`: every measurement, one after the other."""

from benchmarks import finetune, gate

finetune.main()
gate.main()
