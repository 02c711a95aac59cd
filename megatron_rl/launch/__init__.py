"""Start of a run: from a checked config to running ranks, on one machine or several.

    command      the torchrun command of this node, which ``megatron-rl train`` becomes
    meeting      address at which nodes meet, and the number of this one
    node_watch   the launchers of all nodes, watching each other
    launcher     torchrun itself, less its traceback when a rank fails

With several nodes, every node runs one launcher; they meet at node 0, and watch each other while they run:

    node 0                                  node 1, 2, ...
    holds the store at HOST:PORT            connect to it, and wait for it to appear
    ranks 0 .. devices-1; the console       the next ranks; their logs
    judges all other nodes                  judge node 0
"""
