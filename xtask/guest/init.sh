#!/bin/sh
# First process of the virtual machine: brings up what a node has, runs one command, reports its exit code on the
# second serial port, and switches off.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
mount -t securityfs securityfs /sys/kernel/security 2>/dev/null
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -o remount,rw /
mkdir -p /palisade /host
mount -t ext4 -o ro /dev/vdb /palisade
mount --bind /palisade/host /host
ip link set lo up
echo "127.0.0.1 localhost palisade-guest" > /etc/hosts
: > /etc/resolv.conf
hostname palisade-guest
stty -F /dev/ttyS0 raw -echo 2>/dev/null
export PATH=/palisade/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
# As systemd has it: the runtime is in a cgroup of its own, so that containers are not below the shell's.
mkdir -p /sys/fs/cgroup/system.slice/containerd.service /sys/fs/cgroup/init.scope
echo $$ > /sys/fs/cgroup/init.scope/cgroup.procs
if [ -e /palisade/start-containerd ]; then
    sh -c 'echo $$ > /sys/fs/cgroup/system.slice/containerd.service/cgroup.procs; exec containerd' > /tmp/containerd.log 2>&1 &
    tries=600
    until ctr --connect-timeout 1s plugins ls 2>/dev/null | grep -q 'cri .*ok'; do
        tries=$((tries - 1))
        if [ $tries = 0 ] || ! kill -0 $! 2>/dev/null; then
            echo "containerd does not come up:"; cat /tmp/containerd.log
            echo "exit 125" > /dev/ttyS1; sync; echo o > /proc/sysrq-trigger; sleep 60
        fi
        sleep 0.1
    done
fi
echo up > /dev/ttyS1
cd /host
sh /palisade/command
code=$?
sync
echo "exit $code" > /dev/ttyS1
echo o > /proc/sysrq-trigger
sleep 60
