"""`make bench`: every measurement, one after the other."""

from benchmarks import finetune, flow_overhead, gate, padding, reading

padding.main()
reading.main()
finetune.main()
flow_overhead.main()
gate.main()
