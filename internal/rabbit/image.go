package rabbit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/testcontainers/testcontainers-go"
)

const (
	registryAnswerLimit = 20 * time.Second // until a registry says anything
	pullLimit           = 6 * time.Minute
	buildLimit          = 5 * time.Minute
)

// An origin says where the image of a generation comes from.
type origin struct {
	pulled string // reference at the public registry
	built  string // tag of the image made here
	suite  string // Debian suite that ships this generation
}

var origins = map[Generation]origin{
	Gen310: {"rabbitmq:3.10-management", "steadymq/rabbitmq:3.10", "bookworm"},
	Gen40:  {"rabbitmq:4.0-management", "steadymq/rabbitmq:4.0", "trixie"},
	Gen43:  {"rabbitmq:4.3-management", "steadymq/rabbitmq:4.3", "sid"},
	// A stable suite stands in for "any": sid changes under the tests.
	Any: {"rabbitmq:4-management", "steadymq/rabbitmq:4.0", "trixie"},
}

// Generations are those that can be asked for, oldest first.
func Generations() []Generation { return []Generation{Gen310, Gen40, Gen43} }

// images serializes getting an image: tests that start together must not build the same one twice.
var images struct {
	sync.Mutex
	registryGone error
}

// imageFor returns an image of the generation: one that is here, else pulled, else built.
func imageFor(ctx context.Context, g Generation) (string, error) {
	from, ok := origins[g]
	if !ok {
		return "", fmt.Errorf("rabbit: no image for generation %q", g)
	}
	images.Lock()
	defer images.Unlock()
	for _, name := range []string{from.pulled, from.built} {
		if haveImage(ctx, name) {
			return name, nil
		}
	}
	errPull := images.registryGone
	if errPull == nil {
		if errPull = pull(ctx, from.pulled); errPull == nil {
			return from.pulled, nil
		}
		images.registryGone = errPull
	}
	if err := build(ctx, from); err != nil {
		return "", fmt.Errorf("rabbit: image: pull: %w; build: %w", errPull, err)
	}
	return from.built, nil
}

func haveImage(ctx context.Context, name string) bool {
	return withDocker(ctx, func(cli *testcontainers.DockerClient) error {
		_, err := cli.ImageInspect(ctx, name)
		return err
	}) == nil
}

// pull gives the registry a short time to answer and then a long one to deliver.
func pull(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, pullLimit)
	defer cancel()
	answer := time.AfterFunc(registryAnswerLimit, cancel)
	defer answer.Stop()
	start := time.Now()
	logf("pulling %s", name)
	err := withDocker(ctx, func(cli *testcontainers.DockerClient) error {
		response, err := engineCall(ctx, cli.ImagePull, name, `{}`)
		if err != nil {
			return err
		}
		answer.Stop()
		return response.Wait(ctx)
	})
	if err != nil {
		err = fmt.Errorf("no registry gave %s within %v: %w", name, time.Since(start).Round(time.Second), err)
		logf("%v", err)
		return err
	}
	logf("pulled %s in %v", name, time.Since(start).Round(time.Second))
	return nil
}

// build makes an image from Debian's packages: a bare root file system with rabbitmq-server in it, plus a start script.
func build(ctx context.Context, from origin) error {
	ctx, cancel := context.WithTimeout(ctx, buildLimit)
	defer cancel()
	if os.Getuid() != 0 {
		return errors.New("debootstrap needs root")
	}
	debootstrap, err := findDebootstrap(ctx)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "steadymq-image-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	start := time.Now()
	logf("building %s from Debian %s: about a minute", from.built, from.suite)
	root := filepath.Join(dir, "root")
	args := []string{"--variant=minbase", "--include=rabbitmq-server", from.suite, root}
	if mirror := debianMirror(); mirror != "" {
		args = append(args, mirror)
	}
	if out, err := exec.CommandContext(ctx, debootstrap, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("debootstrap %s: %w: %s", from.suite, err, tail(string(out), 600))
	}
	if err := addStartScript(root); err != nil {
		return err
	}
	if err := importImage(ctx, root, from.built); err != nil {
		return err
	}
	logf("built %s in %v", from.built, time.Since(start).Round(time.Second))
	return nil
}

func findDebootstrap(ctx context.Context) (string, error) {
	if path, err := exec.LookPath("debootstrap"); err == nil {
		return path, nil
	}
	if err := installPackage(ctx, "debootstrap"); err != nil {
		return "", err
	}
	return exec.LookPath("debootstrap")
}

const startScriptPath = "/usr/local/bin/steadymq-rabbitmq"

// startScript gives the broker the files that were copied in as root, and its signals: as process 1 it must be the broker's own script.
const startScript = `#!/bin/sh
set -e
chown -R rabbitmq: /var/lib/rabbitmq /var/log/rabbitmq
cd /var/lib/rabbitmq
exec setpriv --reuid=rabbitmq --regid=rabbitmq --init-groups /usr/lib/rabbitmq/bin/rabbitmq-server
`

func addStartScript(root string) error {
	_ = os.Remove(filepath.Join(root, "var/lib/rabbitmq/.erlang.cookie"))
	return os.WriteFile(filepath.Join(root, startScriptPath), []byte(startScript), 0o755) // it is a program
}

// importImage pipes the root file system into the engine. The search path puts the broker's own commands first: Debian's wrappers around
// them start a second shell as another user each time.
func importImage(ctx context.Context, root, tag string) error {
	tar := exec.CommandContext(ctx, "tar", "-C", root, "--numeric-owner",
		"--exclude=./var/cache/apt/archives/*.deb", "--exclude=./usr/share/doc/*", "-c", ".")
	var complaint bytes.Buffer
	tar.Stderr = &complaint
	stream, err := tar.StdoutPipe()
	if err != nil {
		return err
	}
	if err := tar.Start(); err != nil {
		return err
	}
	errImport := withDocker(ctx, func(cli *testcontainers.DockerClient) error {
		options, err := json.Marshal(map[string]any{"Changes": []string{
			`CMD ["` + startScriptPath + `"]`,
			"ENV HOME=/var/lib/rabbitmq LANG=C.UTF-8 PATH=/usr/lib/rabbitmq/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			fmt.Sprintf("EXPOSE %d", amqpPort),
		}})
		if err != nil {
			return err
		}
		answer, err := engineImport(ctx, cli.ImageImport, stream, tag, string(options))
		if err != nil {
			return err
		}
		defer func() { _ = answer.Close() }()
		_, err = io.Copy(io.Discard, answer)
		return err
	})
	if err := tar.Wait(); err != nil {
		return errors.Join(errImport, fmt.Errorf("tar: %w: %s", err, tail(complaint.String(), 400)))
	}
	return errImport
}

// installPackage installs one Debian package, if this process may. RUNLEVEL=1 keeps a service in it from being started.
func installPackage(ctx context.Context, name string) error {
	if !mayInstall() {
		return fmt.Errorf("%s is not installed, and STEADYMQ_INSTALL=1 is not set", name)
	}
	apt, err := exec.LookPath("apt-get")
	if err != nil || os.Getuid() != 0 {
		return fmt.Errorf("%s is not installed, and installing it needs apt-get and root", name)
	}
	logf("installing %s", name)
	install := func() ([]byte, error) {
		cmd := exec.CommandContext(ctx, apt, "install", "-y", "-qq", "--no-install-recommends", name)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1")
		return cmd.CombinedOutput()
	}
	out, err := install()
	if err != nil { // the lists may be missing or old
		_ = exec.CommandContext(ctx, apt, "update", "-qq").Run()
		out, err = install()
	}
	if err != nil {
		return fmt.Errorf("apt-get install %s: %w: %s", name, err, tail(string(out), 400))
	}
	return nil
}

// debianMirror is the mirror this machine's own apt uses, "" where it names none: then debootstrap takes its default.
func debianMirror() string {
	files, _ := filepath.Glob("/etc/apt/sources.list.d/*")
	for _, file := range append([]string{"/etc/apt/sources.list"}, files...) {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		if mirror := mirrorIn(string(text)); mirror != "" {
			return mirror
		}
	}
	return ""
}

// mirrorIn finds the first package archive of Debian proper in either format of apt's lists.
func mirrorIn(text string) string {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "deb ") && !strings.HasPrefix(line, "URIs:") {
			continue
		}
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "http") && strings.HasSuffix(strings.TrimRight(word, "/"), "/debian") {
				return word
			}
		}
	}
	return ""
}
