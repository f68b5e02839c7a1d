from tests.prometheus.test_prometheus import *
from tests.prometheus.test_prometheus import test_no_count_is_lost_by_a_crash as t
@pytest.mark.prometheus
def test_show(daemon,prometheus):
    try: t(daemon,prometheus)
    finally:
        for name in ("bpf_run_queue_latency_seconds_sum","bpf_run_queue_latency_seconds_count"):
            for r in prometheus.ask("query",query=f'{name}{{job="{JOB}"}}[1h]')["result"]: print(name,r["metric"]["cgroup"],*r["values"],sep="\n")
