"""A mixed load under faults, in Jepsen's words: workload, nemesis, checker. Tests of faults use them too."""
