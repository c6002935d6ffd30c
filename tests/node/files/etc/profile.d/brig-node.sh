export PATH=/host/bin:/run/brig-node/containerd/usr/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
