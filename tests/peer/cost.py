"""What something costs: read by both sides of a comparison, so nothing but the standard library."""

import resource
import time


def measured(action):
    """What an action gives, and its seconds: on the clock, and of computing."""
    started, used = time.perf_counter(), computing()
    result = action()
    return result, {"seconds": time.perf_counter() - started, "cpu_seconds": computing() - used}


def computing():
    """Seconds this process has computed so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_gib():
    """Most memory this process has had (on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
