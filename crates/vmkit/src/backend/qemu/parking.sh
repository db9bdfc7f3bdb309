# Run by the guest agent. `park SECONDS` stops all programs of the guest but PID 1 (without systemd),
# the agent and what that runs, by the cgroup freezer. `thaw` lets them go on, and prints `parked` if
# they stood still until then. In case nobody does, the guest does so itself after so many seconds.
list=/run/vmkit-parked
# Which parking it is: a guest that waits to end one must not end a later one.
mark=/run/vmkit-parked.id
fail() {
    echo "$1" >&2
    exit 1
}
each() {
    while IFS= read -r dir; do
        echo "$1" >"$dir/cgroup.freeze" || return 1
    done <$list
}
thaw() {
    [ ! -e $list ] || { each 0; rm -f $list $mark; }
}
if [ "$1" = thaw ]; then
    [ ! -e $mark ] || echo parked
    thaw
    exit
fi
thaw 2>/dev/null
root=
while read -r _ dir type _; do
    [ "$type" != cgroup2 ] || root=$dir
done </proc/mounts
if [ -z "$root" ]; then
    root=/run/vmkit-cgroup
    mkdir -p $root && mount -t cgroup2 none $root || fail "the guest has no cgroups of version 2"
fi
own=$(sed -n 's/^0:://p' /proc/self/cgroup)
: >$list || fail "cannot write $list"
if [ "${own:-/}" = / ]; then
    group=$root/vmkit-parked
    mkdir -p "$group" && [ -e "$group/cgroup.freeze" ] || fail "the guest's cgroups can't be frozen"
    for dir in /proc/[0-9]*; do
        pid=${dir#/proc/}
        # A thread of the kernel has no program.
        case $pid in 1 | $$ | $PPID) continue ;; esac
        [ -z "$(readlink "$dir/exe")" ] || echo "$pid" >"$group/cgroup.procs" 2>/dev/null
    done
    echo "$group" >$list
else
    at=$root IFS=/
    for part in ${own#/}; do
        for dir in "$at"/*/; do
            dir=${dir%/}
            [ "$dir" = "$at/$part" ] || [ ! -e "$dir/cgroup.freeze" ] || echo "$dir" >>$list
        done
        at=$at/$part
    done
    unset IFS
    [ -s $list ] || fail "the guest's cgroups can't be frozen"
fi
id=$(cat /proc/sys/kernel/random/uuid)
echo "$id" >$mark || fail "cannot write $mark"
(
    sleep "$2"
    [ "$(cat $mark)" != "$id" ] || thaw
) </dev/null >/dev/null 2>&1 &
each 1 || { thaw; fail "the guest's cgroups can't be frozen"; }
tries=0
while IFS= read -r dir; do
    until grep -q '^frozen 1' "$dir/cgroup.events"; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || { thaw; fail "the programs of $dir do not stop"; }
        sleep 0.02
    done
done <$list
