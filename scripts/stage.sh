# Sourced by scripts that run experiments in stages.

# stage FOLDER NAME COMMAND...: run the command once; its marker in FOLDER/done holds the command, for the report. Where
# stage_log is set, what the command prints goes into that file.
stage() {
  local done_folder=$1/done name=$2 start=$SECONDS
  shift 2
  mkdir -p "$done_folder"
  if [ -e "$done_folder/$name" ]; then echo "== $name: done before"; return; fi
  echo "== $name"
  if [ -n "${stage_log:-}" ]; then in_log "$name" "$@"; else "$@"; fi
  { echo "# $name: $((SECONDS - start)) s"; printf '%q ' "$@"; echo; } > "$done_folder/$name.unfinished"
  mv "$done_folder/$name.unfinished" "$done_folder/$name"
  echo "== $name: $((SECONDS - start)) s"
}

# in_log NAME COMMAND...: of a command that fails, but not by ctrl-C, the last line is shown.
in_log() {
  local name=$1 status=0
  shift
  "$@" >> "$stage_log" 2>&1 || status=$?
  if [ $status != 0 ] && [ $status != 130 ]; then
    echo "error: $name failed: $(tail -n 1 "$stage_log") (see $stage_log)" >&2
  fi
  return $status
}

# side_by_side NUMBER "WORD..." COMMAND...: run COMMAND once for each word, so many at a time. A signal that ends the script
# goes to all of them, and it waits for their end: training finishes its step and keeps it.
side_by_side() {
  local number=$1 words=$2 status=0
  shift 2
  set -m  # a process group of their own
  xargs -n 1 -P "$number" "$@" <<< "$words" &
  local group=$!
  set +m
  trap 'kill -INT -- -$group 2>/dev/null || true' INT
  trap 'kill -TERM -- -$group 2>/dev/null || true' TERM
  wait "$group" || status=$?
  while kill -0 -- "-$group" 2>/dev/null; do sleep 0.2; done
  trap - INT TERM
  return $status
}

# commands_of FOLDER: the commands of its finished stages, in order.
commands_of() { (cd "$1/done" && ls -tr | xargs cat); }
