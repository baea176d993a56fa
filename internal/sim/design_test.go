package sim_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// docs/DESIGN.md is read by who does not know the code yet, so what it names has to be there.

var (
	quoted    = regexp.MustCompile("`([^`\n]+)`")
	floorFile = regexp.MustCompile(`"(\w+\.go)"`)
)

func design(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(inRoot("docs/DESIGN.md"))
	require.NoError(t, err)
	return string(text)
}

// tables returns the rows of all tables of a document that have these columns, each row as what is
// in backticks in each column.
func tables(text string, columns ...string) (rows [][][]string) {
	head := "| " + strings.Join(columns, " | ") + " |"
	inside := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case line == head:
			inside = true
		case !strings.HasPrefix(line, "|"):
			inside = false
		case inside && !strings.HasPrefix(line, "| ---"):
			var row [][]string
			for cell := range strings.SplitSeq(strings.Trim(line, "|"), " | ") {
				var names []string
				for _, found := range quoted.FindAllStringSubmatch(cell, -1) {
					names = append(names, found[1])
				}
				row = append(row, names)
			}
			rows = append(rows, row)
		}
	}
	return rows
}

// functionsOf returns the names of the functions that a file declares, methods with their type
// before them.
func functionsOf(t *testing.T, file string) map[string]bool {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), inRoot(file), nil, parser.SkipObjectResolution)
	require.NoError(t, err)
	names := make(map[string]bool)
	for _, d := range parsed.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		name := f.Name.Name
		if f.Recv != nil {
			name = receiverOf(f.Recv.List[0].Type) + "." + name
		}
		names[name] = true
	}
	return names
}

func receiverOf(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiverOf(e.X)
	case *ast.IndexExpr:
		return receiverOf(e.X)
	case *ast.Ident:
		return e.Name
	}
	return ""
}

func TestFilesOfTheDesignExist(t *testing.T) {
	text := design(t)
	named := 0
	for _, found := range quoted.FindAllStringSubmatch(text, -1) {
		if strings.HasSuffix(found[1], ".go") {
			named++
			assert.FileExists(t, inRoot(found[1]), "docs/DESIGN.md names it")
		}
	}
	assert.Greater(t, named, 50, "files that docs/DESIGN.md names in backticks")
	folders := tables(text, "folder", "what is in it")
	assert.NotEmpty(t, folders)
	for _, row := range folders {
		assert.DirExists(t, inRoot(row[0][0]), "docs/DESIGN.md names it")
	}
}

// Each hop names one file, and functions that stand there under these names.
func TestHopsOfTheDesignExist(t *testing.T) {
	hops := tables(design(t), "hop", "file", "function")
	assert.Greater(t, len(hops), 50, "hops of docs/DESIGN.md")
	for _, hop := range hops {
		require.Len(t, hop, 3, "columns of a hop: %v", hop)
		require.Len(t, hop[1], 1, "a hop has one file: %v", hop)
		assert.NotEmpty(t, hop[2], "a hop has functions: %v", hop)
		declared := functionsOf(t, hop[1][0])
		for _, name := range hop[2] {
			assert.True(t, declared[name], "docs/DESIGN.md looks for %s in %s, which does not declare it", name, hop[1][0])
		}
	}
}

// The list of rooms is that of the floors, so a new file has its line there, at its height.
func TestRoomsOfTheDesignAreTheFloors(t *testing.T) {
	source, err := os.ReadFile(inRoot("scripts/floors/main.go"))
	require.NoError(t, err)
	_, list, _ := strings.Cut(string(source), "var rooms = []room{")
	list, _, _ = strings.Cut(list, "\n}")
	var floors, rooms []string
	for _, found := range floorFile.FindAllStringSubmatch(list, -1) {
		floors = append(floors, found[1])
	}
	for _, row := range tables(design(t), "file", "what is in it") {
		rooms = append(rooms, row[0][0])
	}
	assert.Equal(t, floors, rooms)
}
