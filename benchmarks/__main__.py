"""`make bench`: every measurement that needs no GPU, one after the other."""

from benchmarks import cpu_training, finetune, flow_overhead, gate, memory, padding, reading

padding.main()
reading.main()
memory.main()
finetune.main()
flow_overhead.main()
cpu_training.main()
gate.main()
