import json,time
from tests.prometheus.test_prometheus import *
@pytest.mark.prometheus
def test_show(prometheus):
    for path in DASHBOARDS:
        print('==',path.stem)
        for t,q in queries(path):
            n=prometheus.numbers(q)
            print(f'{t:45} n={len(n):6} min={min(n,default=None)} max={max(n,default=None)}')
    for name in [rule["record"] for group in yaml.safe_load((RULES / "recording.yaml").read_text())["groups"] for rule in group["rules"]]:
        n=prometheus.numbers(name); print(name,len(n),max(n,default=None))
    for a in prometheus.ask("alerts")["alerts"]: print(a)
    print(prometheus.exemplars('bpf_tcp_retransmits_total')[:3])
