#!/usr/bin/env bash
# Two nodes on one machine: network namespaces with addresses of their own, which a virtual cable joins. Each runs one
# rank of a module on the CPU; they share files and nothing else. Needs root and iproute2.
#   bash scripts/ray/two_nodes.sh torchrun|deepspeed|ray MODULE FLAGS...
#   bash scripts/ray/two_nodes.sh lost_node METRICS_FILE MODULE FLAGS...
# lost_node: a Ray cluster whose second node is killed once METRICS_FILE has three steps; the run goes on with the first.
set -euo pipefail

how=${1:?give torchrun, deepspeed, ray or lost_node, then a module and its flags}
shift
if [ "$how" = lost_node ]; then metrics=${1:?lost_node needs the metrics.jsonl of the run}; shift; fi
nodes=(pipa$$a pipa$$b) addresses=(10.77.0.1 10.77.0.2) port=29500 started=()
# The collectives' device; a host name would lead to the machine's own address.
export GLOO_SOCKET_IFNAME=pipa CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
hostfile=$(mktemp)

end() {
  for process in "${started[@]}"; do
    kill "$process" 2> /dev/null || continue
    for _ in $(seq 20); do if kill -0 "$process" 2> /dev/null; then sleep 0.5; fi; done
    # A node of Ray that got two signals hangs.
    if kill -0 "$process" 2> /dev/null; then pkill -KILL -P "$process" || true; kill -KILL "$process"; fi
  done
  for node in "${nodes[@]}"; do ip netns del "$node" 2> /dev/null || true; done
  rm -f "$hostfile"
}
trap end EXIT

for i in 0 1; do
  ip netns add "${nodes[i]}"
  ip -n "${nodes[i]}" link set lo up
  echo "${addresses[i]} slots=1" >> "$hostfile"
done
ip link add pipa netns "${nodes[0]}" type veth peer name pipa netns "${nodes[1]}"
for i in 0 1; do
  ip -n "${nodes[i]}" addr add "${addresses[i]}/24" dev pipa
  ip -n "${nodes[i]}" link set pipa up
done

on() { local node=${nodes[$1]}; shift; exec ip netns exec "$node" "$@"; }
head=(ray start --head --node-ip-address "${addresses[0]}" --port $port --include-dashboard false)
second=(ray start --address "${addresses[0]}:$port" --node-ip-address "${addresses[1]}")
small=(--block --disable-usage-stats --num-cpus 1 --object-store-memory 100000000)

case "$how" in
  torchrun | deepspeed)
    for i in 0 1; do
      if [ "$how" = torchrun ]; then
        launch=(torchrun --nnodes 2 --node-rank $i --nproc-per-node 1 --master-addr "${addresses[0]}" --master-port $port -m)
      else
        launch=(deepspeed --hostfile "$hostfile" --no_ssh --node_rank $i --master_addr "${addresses[0]}" --master_port $port --module)
      fi
      (on $i "${launch[@]}" "$@") &
      started+=($!)
    done
    for process in "${started[@]}"; do wait "$process"; done
    ;;
  ray | lost_node)
    (on 0 "${head[@]}" "${small[@]}") > /dev/null &
    started+=($!)
    until (on 0 ray health-check --address "${addresses[0]}:$port") 2> /dev/null; do sleep 1; done
    (on 1 "${second[@]}" "${small[@]}") > /dev/null &
    started+=($!)
    flags=(--ray.address "${addresses[0]}:$port" --ray.num_workers 2 --ray.resources_per_worker '{"CPU":1}')
    [ "$how" = ray ] || flags+=(--ray.min_workers 1 --ray.max_failures 1)
    (on 0 python -m pipa_openrlhf.cli.launch_ray "${flags[@]}" -- "$@") &
    run=$!
    if [ "$how" = lost_node ]; then
      until [ -e "$metrics" ] && [ "$(wc -l < "$metrics")" -ge 3 ]; do kill -0 $run; sleep 0.1; done
      echo "== the second node is lost after step $(wc -l < "$metrics")"
      ip -n "${nodes[1]}" link set pipa down
    fi
    wait $run
    ;;
  *) echo "error: $how is not torchrun, deepspeed, ray or lost_node" >&2; exit 1 ;;
esac
echo "== done on ${addresses[*]}"
