"""Rollouts from SGLang servers.

engine.py      RolloutEngine: the collective part; rank 0 drives, all ranks get the result
driver.py      rank 0's side: the event loop and what lives in it
dispatch.py    requests -> completions: who asks whom, deadlines, retries, early stop
fleet.py       which servers may serve now, and what is known of each
client.py      one server over HTTP: SGLang's field names, in and out
versions.py    what differs between SGLang releases
supervisor.py  starts, watches, restarts and stops the processes of one node
"""
