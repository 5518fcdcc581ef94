#!/bin/busybox sh
# First process of a guest, from the initrd: brings up devices and the root file system, then becomes the agent.
B=/bin/busybox
die() {
    echo "blixard-init: $*" >/dev/console
    $B poweroff -f
}
$B mkdir -p /proc /sys /dev /image /memory /root
$B mount -t proc -o nosuid,nodev,noexec proc /proc
$B mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
$B mount -t devtmpfs -o nosuid devtmpfs /dev
while read -r module; do
    $B insmod "/modules/$module" || die "cannot load $module"
done </modules/order

# Devices appear a moment after their drivers.
tries=0
while [ ! -e /dev/vda ] || [ ! -e /dev/vport0p1 ] && [ ! -e /dev/vport1p1 ] && [ ! -e /dev/vport2p1 ]; do
    tries=$((tries + 1))
    [ $tries -lt 3000 ] || die "no disk or no agent port"
    $B sleep 0.01
done

# The image stays read-only; what a job writes goes to memory.
$B mount -t ext4 -o ro,noatime /dev/vda /image || die "cannot mount the image"
$B mount -t tmpfs -o mode=0755,size=90% memory /memory
$B mkdir /memory/upper /memory/work
$B mount -t overlay -o lowerdir=/image,upperdir=/memory/upper,workdir=/memory/work root /root || die "cannot mount the overlay"
$B mkdir -p /root/opt/blixard
$B cp -r /guest/lib /root/opt/blixard/lib

for directory in proc sys dev; do $B mount --move /$directory /root/$directory; done
$B mkdir -p /root/dev/shm /root/dev/pts
$B mount -t tmpfs -o nosuid,nodev,mode=1777 shm /root/dev/shm
$B mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts /root/dev/pts
$B mount -t tmpfs -o nosuid,nodev,mode=0755 run /root/run
$B mount -t tmpfs -o nosuid,nodev,mode=1777 tmp /root/tmp
$B mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /root/sys/fs/cgroup || die "cannot mount cgroup2"
$B ip link set lo up
$B hostname guest
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/
exec $B switch_root -c /dev/console /root /usr/bin/python3 -S -E /opt/blixard/lib/start_agent.py
